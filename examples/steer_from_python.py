"""Steer a model from Python, and look at how the strength was chosen.

Run: python examples/steer_from_python.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.demo import MODEL  # the small model that ships with the project; any folder will do
from austeer.compiler.verbs.steer import steer
from austeer.compiler.verbs.verify import verify


def main() -> None:
    settings = Settings(device="cpu")
    with TemporaryDirectory() as folder:
        out = Path(folder) / "steered"
        report = steer(
            str(MODEL), MODEL / "pairs.jsonl", out, top_k=8, neutral=MODEL / "neutral.txt", settings=settings
        )
        found = report.choice.search
        assert found is not None
        for trial in found.table:
            accuracy = f"{trial.effect.accuracy:.3f}" if trial.effect else "beyond the limit"
            print(f"k {trial.point['k']}  alpha {trial.alpha:.3f}  drift {trial.drift:.4f}  accuracy {accuracy}")
        print(f"base {found.base.accuracy:.3f}; chosen: k {report.choice.k}, alpha {report.choice.alpha:.3f}")
        print("verified:", verify(out, base=str(MODEL), texts=MODEL / "neutral.txt", settings=settings).passed)


if __name__ == "__main__":
    main()
