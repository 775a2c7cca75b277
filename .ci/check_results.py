"""Hold the newest run of experiment=simclr against what the README promises."""

import json
from pathlib import Path

path = max(Path("logs/simclr").glob("*/results.json"), key=lambda p: p.stat().st_mtime)
results = json.loads(path.read_text())
print(json.dumps(results, indent=2))
assert results["test/knn"] >= 0.92, "test k-NN accuracy below 92%"
assert results["raw_pixels/knn"] <= 0.70, "raw pixels above 70%: the data are too easy"
assert results["test/linear"] > results["raw_pixels/knn"]
assert results["gradient_checks/run"] > 0, "no gradient check ran"
assert results["gradient_checks/failed"] == 0
assert results["wall_seconds"] < 180
assert (path.parent / "checkpoints/last.ckpt").exists()
assert (path.parent / "checkpoints/best.ckpt").exists()
