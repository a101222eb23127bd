"""Repositories of the Hugging Face hub: sending files, fetching known ones, and the head of a model card.

The token is the hub client's own (``hf auth login``, or ``HF_TOKEN``); nothing here reads or prints it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from seqgraft.errors import ModelError, RunError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

__all__ = ["card_head", "check_size", "download", "upload"]


def upload(
    folder: Path, repository: str, names: Sequence[str], *, marker: str, private: bool, branch: str | None, message: str
) -> str:
    """Sends files of a folder in one commit to a repository, which is made if need be; returns the full commit.

    Args:
        names: of files; those that the folder lacks are removed from the repository.
        marker: one of them, which tells a repository of this kind.

    Raises:
        RunError: the repository holds something else, or is public where it should be private; the hub is out of reach
            or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api, there = HfApi(), set[str]()
    with _refusals(repository):
        try:
            known = api.model_info(repository)
        except RepositoryNotFoundError:
            known = None
            api.create_repo(repository, private=private)
        if known is not None:
            there = _files(known) & set(names)
            if there and marker not in there:
                what, remedy = "the repository holds something else already", "Choose another name"
                raise RunError(what, sorted(there), where=repository, remedy=remedy)
            if private and not known.private:
                remedy = "Make it private in its settings on the hub first, or choose another name"
                raise RunError("the repository exists and is public", where=repository, remedy=remedy)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
            there = _files(api.model_info(repository, revision=branch)) & set(names)
        sent = [name for name in names if (folder / name).exists()]
        changes = [CommitOperationAdd(name, folder / name) for name in sent]
        gone = [CommitOperationDelete(name) for name in sorted(there - set(sent))]
        commit = api.create_commit(repository, [*changes, *gone], commit_message=message, revision=branch)
    return str(commit.oid)


def _files(info: ModelInfo) -> set[str]:
    return {file.rfilename for file in info.siblings or ()}


def download(repository: str, commit: str, wanted: Mapping[str, int], needed: Sequence[str], folder: Path) -> None:
    """Copies files of a repository at a commit into a folder; whatever else it holds stays where it is.

    Args:
        wanted: names of files, and the most bytes that each may have.
        needed: those that must be there.

    Raises:
        ModelError: a file is missing or too large; the repository cannot be read.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _refusals(repository, ModelError):
        info = api.model_info(repository, revision=commit, files_metadata=True)
        if info.sha != commit:  # a branch can have a name of 40 digits
            remedy = "Check it: the hub takes it for a name of something else"
            raise ModelError("the repository has no such commit", commit, where=repository, remedy=remedy)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        if missing := [name for name in needed if name not in sizes]:
            remedy = "Check name and commit: it must be what 'seqgraft push' wrote"
            raise ModelError("the repository lacks files of a shared adapter", missing, where=repository, remedy=remedy)
        for name in (name for name in wanted if name in sizes):
            check_size(name, sizes[name] or 0, wanted[name], repository)
            path = Path(api.hf_hub_download(repository, name, revision=commit))
            check_size(name, path.stat().st_size, wanted[name], repository)
            shutil.copyfile(path, folder / name)


def check_size(name: str, size: int, most: int, where: object) -> None:
    """Refuses a file that is larger than anything of its kind.

    Raises:
        ModelError: it is.
    """
    if size > most:
        what = f"the file {name} has more bytes than one of its kind may have, {most}"
        raise ModelError(what, size, where=where, remedy="Do not use it; ask who shared it")


def card_head(facts: Mapping[str, Any], name: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The YAML head of a model card, as the hub's own class writes it, between its lines of hyphens.

    Args:
        facts: arguments of ``huggingface_hub.ModelCardData``.
        name: of the model.
        results: each the arguments of a ``huggingface_hub.EvalResult``.
    """
    from huggingface_hub import EvalResult, ModelCardData

    scored = [EvalResult(**result) for result in results]
    data = ModelCardData(**facts, model_name=name, eval_results=scored) if scored else ModelCardData(**facts)
    return f"---\n{data.to_yaml()}\n---\n"


@contextmanager
def _refusals(repository: str, kind: type[ModelError | RunError] = RunError) -> Iterator[None]:
    """What the hub, the network or the client's settings say no to, in our words."""
    from huggingface_hub.errors import HfHubHTTPError

    # the base of the errors of whichever HTTP client huggingface_hub uses
    of_client = cast("type[Exception]", HfHubHTTPError.__mro__[1])
    try:
        yield
    except (OSError, ValueError, HfHubHTTPError, of_client) as error:
        said = " ".join(str(error).split())
        raise kind(
            f"the hub could not be asked ({type(error).__name__}: {said})",
            where=repository,
            remedy="Check the name, the network and your login ('hf auth login', or HF_TOKEN), or share a folder",
        ) from error
