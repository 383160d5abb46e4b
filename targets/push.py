"""Push: a compiled folder to a model repository of the Hub, in one commit that happens whole or not at all."""

from dataclasses import replace
from typing import Any

from austeer.compiler.manifest import MANIFEST
from austeer.compiler.progress import hub_bars
from austeer.targets.contents import Contents
from austeer.targets.push_plan import Plan, Step, compare, read
from austeer.targets.trouble import explained, in_a_line, is_about_copies, trouble


def push(plan: Plan, *, public: bool = False) -> tuple[str, Plan]:
    """Carries a plan out: uploads what is to be uploaded, then makes one commit on the head that the plan saw.

    Returns the commit that holds the model, and the plan as it was done: what the Hub does not copy is uploaded.
    A new repository is private unless `public`. Raises OutputError; the repository is then unchanged, and what was
    uploaded is not sent again next time.
    """
    if plan.remote.head and not plan.changes:
        return plan.remote.head, plan
    with explained(plan.remote.id), hub_bars():
        head = plan.remote.head or _create(plan.remote.id, public=public)
        try:
            return _commit(plan, head), plan
        except trouble() as error:
            if not is_about_copies(error):
                raise
            plan = _without_copies(plan, in_a_line(error))
        return _commit(plan, head), plan


def _without_copies(plan: Plan, reason: str) -> Plan:
    note = f"the Hub did not copy from {plan.contents.base}, so that was uploaded too ({reason})"
    steps = (Step(step.path, step.size, "upload") if step.action == "copy" else step for step in plan.steps)
    return replace(plan, steps=tuple(steps), notes=(*plan.notes, note))


def _create(repo: str, *, public: bool) -> str:
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, private=not public)
    return str(HfApi().model_info(repo).sha)


def _commit(plan: Plan, head: str) -> str:
    from huggingface_hub import HfApi

    contents = plan.contents
    try:
        made = HfApi().create_commit(
            plan.remote.id,
            [_operation(contents, step) for step in plan.changes],
            commit_message=f"{contents.card_base}, steered (program {contents.program[:12]})",
            commit_description=f"Compiled by austeer-compile; {MANIFEST} says what was edited.",
            parent_commit=head,
        )
    except trouble():
        arrived = _arrived(plan)
        if arrived is None:
            raise
        return arrived
    return made.oid


def _arrived(plan: Plan) -> str | None:
    """The newest commit, if the repository is as planned: an answer that was lost on its way hides a success."""
    try:
        remote = read(plan.remote.id)
    except trouble():
        return None
    steps = compare(plan.contents, remote, {})
    return remote.head if all(step.action == "already there" for step in steps) else None


def _operation(contents: Contents, step: Step) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    if step.action == "delete":
        return CommitOperationDelete(step.path, is_folder=False)
    if step.source is not None:
        return CommitOperationCopy(
            step.source,
            step.path,
            src_revision=contents.revision,
            src_repo_id=contents.base,
            src_repo_type="model",
        )
    return CommitOperationAdd(step.path, contents.path / step.path)
