"""Records with made-up numbers for the tests of tables, figures and sentences."""

from collections.abc import Sequence

from mora_repro.results.records import Cost, Curve, Data, Environment, Evaluation, Parameters, Record
from mora_repro.results.search import grid
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.table import FIRST_SEARCH_SEED, Cell, Setting, load_table

TRAINABLE = {"fft": 700_000}  # times the rank; 1000 of the others
NOWHERE = Environment(
    git_commit=None, git_dirty=None, python="3.11", packages={}, cpu="none", cores=1, memory_gb=1.0, gpus=[]
)


def record(
    cell: Cell,
    seed: int,
    accuracy: Sequence[float],
    *,
    overrides: Sequence[str] = (),
    trainable: int | None = None,
    status: str = "finished",
    loss: float = 1.0,
    base_sha256: str | None = None,
    metric: str = "char_accuracy",
    stderr: float | None = None,
) -> Record:
    """A run of the cell whose metric at its evaluation steps is the given one; its loss is constant."""
    changed = [*cell.overrides(seed), *overrides]
    spec = RunSpec.from_config(compose_config(changed)) if overrides else cell.spec(seed)
    steps = spec.training.evaluate_at or (spec.training.steps,)
    assert len(accuracy) == len(steps)
    errors = {} if stderr is None else {metric: stderr}
    evaluations = [
        Evaluation(step=step, metrics={metric: value}, stderr=errors)
        for step, value in zip(steps, accuracy, strict=True)
    ]
    return Record(
        id=spec.id,
        status=status,  # type: ignore[arg-type]
        spec=spec,
        command="made up",
        started="2024-01-01T00:00:00+00:00",
        environment=NOWHERE,
        data=Data(fingerprint="", examples=64, tokens=1, truncated=0, dropped=0, base=None, base_sha256=base_sha256),
        parameters=Parameters(trainable=trainable or TRAINABLE.get(cell.method, 1000) * (cell.r or 1), total=10**6),
        curve=Curve(step=list(range(1, 301)), loss=[loss] * 300, lr=[1e-3] * 300),
        evaluations=evaluations,
        cost=Cost(wall_s=60.0, train_s=40.0, tokens_per_s=1000.0, peak_memory_mb=500.0),
        metrics=evaluations[-1].metrics,
    )


def tried(cell: Cell, setting: Setting, score: float, status: str = "finished") -> Record:
    """The record of a try of a search whose metric is `score` at all its evaluations."""
    _, spec = cell.tried(setting)
    metric = str(spec.task["metric"])
    made = record(cell, FIRST_SEARCH_SEED, [score] * len(spec.training.evaluate_at), metric=metric)
    return made.model_copy(update={"spec": spec, "id": spec.id, "status": status})


def searched(cell: Cell) -> list[Record]:
    """A whole search of a cell without further rounds, each try better than the one before, and a run at the best."""
    tries = [tried(cell, setting, float(score)) for score, setting in enumerate(grid(cell))]
    return [*tries, record(cell.with_settings(grid(cell)[-1]), 0, [50.0] * len(tries[0].spec.training.evaluate_at))]


def table_records(accuracy: dict[tuple[str, int | None], Sequence[float]], scale: str = "mini") -> list[Record]:
    """Records of Table 2: for a method and rank, one value per seed, the same at every step."""
    return [
        record(cell, seed, [value] * 4)
        for cell in load_table("2").cells(scale)
        for seed, value in enumerate(accuracy.get((cell.method, cell.r), []))
    ]


THREE_SEEDS: dict[tuple[str, int | None], list[float]] = {
    ("fft", None): [90.0, 91.0, 92.0],
    ("lora", 4): [20.0, 22.0, 24.0],
    ("mora", 4): [50.0, 53.0, 53.0],
    ("lora", 32): [60.0, 62.0, 61.0],
    ("mora", 32): [61.0, 60.0, 62.0],
}
