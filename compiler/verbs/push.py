"""push: a compiled folder to the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.targets.contents import Contents
from austeer.targets.push import push as carry_out
from austeer.targets.push_plan import Plan, plan


@dataclass(frozen=True)
class PushReport:
    """What was, or with `dry_run` would be, done to the repository; `commit` is the one that holds the model."""

    url: str
    visibility: str
    plan: Plan
    commit: str | None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        files = [{"file": step.path, "bytes": step.size, "action": step.action} for step in self.plan.steps]
        return {
            "repository": self.plan.remote.id,
            "url": self.url,
            "visibility": self.visibility,
            "parent": self.plan.remote.head,
            "commit": self.commit,
            "files": files,
            "bytes_to_upload": self.plan.bytes_to("upload"),
            "bytes_to_copy": self.plan.bytes_to("copy"),
            "left_out": list(self.plan.contents.left_out),
            "kept": list(self.plan.kept),
            "notes": list(self.plan.notes),
        }


def push(out: str | Path, repo_id: str, *, public: bool = False, dry_run: bool = False) -> PushReport:
    """Makes the model repository `repo_id` hold what was compiled at `out`, in one commit.

    Files that it has are not sent again, files that the base's repository has are copied on the Hub, and what an
    earlier push wrote and `out` no longer has is deleted. A repository that does not exist is made, private unless
    `public`. With `dry_run` nothing is changed. Raises InputError if `out` is not whole, Refused or UsageError if it
    must not go there, OutputError where the Hub fails; the repository is then unchanged.
    """
    from huggingface_hub import constants

    planned, commit = plan(Contents.of(Path(out)), repo_id, public=public), None
    private = planned.remote.private if planned.remote.head else not public
    if not dry_run:
        commit, planned = carry_out(planned, public=public)
    return PushReport(f"{constants.ENDPOINT}/{repo_id}", "private" if private else "public", planned, commit)
