"""From a recipe's path to a plan, and from a recipe or a plan to everything that a run needs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..planner.catalog import find_gpu
from ..planner.files import FilesOf
from ..planner.plan import Plan, PlanInputs, make_plan
from ..planner.shape import ModelShape, is_known_family, make_shape
from ..planner.strategy import DataFacts, Device
from ..planner.widths import padded_width
from ..recipes.errors import FituneError, PlanError
from ..recipes.load import RecipeFile, load_recipe
from .data.preflight import check_data
from .data.prepare import TokenizedData, tokenize_data
from .data.report import DataReport, StreamFacts
from .data.sources import LoadedRows, find_absent, load_rows
from .data.tokens import TokenizedRow
from .machine.cpu_rates import find_cpu_rates
from .machine.devices import probe_device
from .model.models import (
    ModelSource,
    find_model_source,
    has_local_tokenizer,
    load_tokenizer,
    measure_stored_bytes,
    measure_tokenizer_bytes,
)
from .rehearsing import Rehearsals
from .versions import find_versions

STANDING_ROWS = 128
"""Rows whose lengths stand for the dataset's in a plan."""


class Job:
    """One recipe and what it names, each found when first asked for: the model, the data, the plan."""

    def __init__(self, path: str, overrides: Sequence[str] = ()) -> None:
        self.path, self.overrides = path, tuple(overrides)
        self.recipe_file: RecipeFile = load_recipe(path, overrides)
        if any("\ud800" <= character <= "\udfff" for character in path):
            raise PlanError(f"{path!a}: the name is not UTF-8 text, as JSON needs it: rename the file")

    @cached_property
    def source(self) -> ModelSource:
        """The model that the recipe names, without its weights."""
        return find_model_source(self.recipe_file.recipe.model, self.recipe_file.resolve)

    @cached_property
    def shape(self) -> ModelShape:
        """The model's layers and sizes; ModelError for an architecture that cannot be handled.

        One that the planner has no closed forms for is read off the model itself, which transformers then has to build.
        """
        if is_known_family(self.source.config):
            return make_shape(self.source.config)
        try:
            from .model.meta_shape import make_shape_of_model
        except ImportError:
            return make_shape(self.source.config)
        return make_shape_of_model(self.source.config)

    @cached_property
    def rows(self) -> LoadedRows:
        """Training and held-out rows as text."""
        recipe = self.recipe_file.recipe
        return load_rows(recipe.data, self.recipe_file.resolve, seed=recipe.train.seed)

    @cached_property
    def data(self) -> TokenizedData:
        """The rows as tokens; fetches the tokenizer where it is not here yet."""
        recipe = self.recipe_file.recipe
        loaded = self.rows
        tokenizer = load_tokenizer(self.source, trust_remote_code=recipe.model.trust_remote_code)
        return tokenize_data(recipe.data, loaded, tokenizer, self.recipe_file.resolve)

    @cached_property
    def data_report(self) -> DataReport:
        """The data check; its problems are not raised here."""
        recipe = self.recipe_file.recipe
        return check_data(self.path, recipe.data, self.rows, self.data, seed=recipe.train.seed)

    @property
    def data_report_after(self) -> DataReport:
        """The data check once the run is over: with what it read of a stream."""
        stream = self.data.stream
        if stream is None:
            return self.data_report
        counts = stream.counts
        facts = StreamFacts(rows=counts.rows, truncated=counts.truncated, left_out=counts.too_long + counts.empty)
        return self.data_report.model_copy(update={"stream": facts})

    def find_data_facts(self, *, quick: bool) -> DataFacts:
        """The longest row and how many there are: from the tokenised dataset where it and the tokenizer are here."""
        recipe = self.recipe_file.recipe
        longest = recipe.data.max_length
        assumed = f"planned for rows of data.max_length = {longest:,} tokens"
        assumed += ", each timed as one document" if recipe.data.packing else ""
        if quick:
            return DataFacts(longest_row_tokens=longest, source=f"{assumed}: --quick does not read the dataset")
        if recipe.data.streaming:
            return DataFacts(longest_row_tokens=longest, source=f"{assumed}: data.streaming reads them in the run")
        missing = self._find_missing_data()
        if missing is not None:
            return DataFacts(longest_row_tokens=longest, source=f"{assumed}: {missing}")
        if "data" not in vars(self) and not has_local_tokenizer(self.source):
            why = "the model's tokenizer is not here yet"
            return DataFacts(rows=len(self.rows.train_rows), longest_row_tokens=longest, source=f"{assumed}: {why}")
        width = padded_width(self.data.longest_row_tokens, max_length=longest)
        return DataFacts(
            rows=self.data.train.epoch_rows,
            longest_row_tokens=width,
            row_tokens=pick_row_tokens(self.data.train.rows),
            documents_per_row=max(
                (len(row.documents) + 1 for row in self.data.train.rows if row.documents), default=None
            ),
            document_tokens=average_document_tokens(self.data.train.rows),
            eval_rows=len(self.data.eval or ()),
            forgetting_rows=len(self.data.forgetting or ()),
            eval_row_tokens=pick_row_tokens(self.data.eval.rows) if self.data.eval else None,
            forgetting_row_tokens=pick_row_tokens(self.data.forgetting.rows) if self.data.forgetting else None,
            has_question=any(row.messages is not None for row in self.data.eval_rows),
            source="the longest row, tokenised",
        )

    def _find_missing_data(self) -> str | None:
        """A phrase where the training data is not here; a dataset on a hub is fetched by `run` only."""
        data = self.recipe_file.recipe.data
        absent = find_absent(data, self.recipe_file.resolve)
        return f"data.train: {absent} is not here" if absent else None

    def make_plan(self, *, quick: bool) -> Plan:
        """The plan; quick: closed forms alone and without reading the dataset."""
        inputs = self.find_inputs(quick=quick)
        plan = make_plan(inputs, *((None, None) if quick else Rehearsals().find(self.source.config, inputs)))
        if quick or "data" not in vars(self):
            return plan
        refused = tuple(f"a run would be refused: {problem}" for problem in self.data_report.problems)
        return plan.model_copy(update={"warnings": (*plan.warnings, *refused)})

    def find_inputs(self, *, quick: bool, device: Device | None = None, data: DataFacts | None = None) -> PlanInputs:
        """Everything that the plan is made from; for the recipe's own device and dataset where none are given."""
        return PlanInputs(
            recipe_file=self.recipe_file,
            recipe_path=self.path,
            overrides=self.overrides,
            shape=self.shape,
            config_sha256=self.source.config_sha256,
            device=self._add_rates(device or self.probe_device(), quick=quick),
            data=data or self.find_data_facts(quick=quick),
            versions=find_versions(),
            files_of=None if quick else self.files_of,
            stored_bytes=measure_stored_bytes(self.source.folder),
            tokenizer_bytes=measure_tokenizer_bytes(self.source.folder),
        )

    @staticmethod
    def _add_rates(device: Device, *, quick: bool) -> Device:
        """A CPU's rates: probed once and kept, which takes a second; quick: only if they were probed before."""
        if device.kind == "cuda" or device.rates is not None:
            return device
        return device.model_copy(update={"rates": find_cpu_rates(may_probe=not quick)})

    @cached_property
    def files_of(self) -> FilesOf | None:
        """The weights that a run writes, to the byte; None on a machine without torch."""
        try:
            from .model.files import make_files_of
        except ImportError:
            return None
        return make_files_of(self.source.config, merge=self.recipe_file.recipe.output.merge)

    def probe_device(self) -> Device:
        """The device that the recipe's budget names, or else what this machine has."""
        return probe_device(self.recipe_file.recipe.budget, disk_path=self.output_parent)

    @property
    def output_parent(self) -> Path:
        """The folder that the run's directory is, or will be, in."""
        written = self.recipe_file.recipe.output.dir
        return Path("runs") if written is None else self.recipe_file.resolve(written).parent


def pick_row_tokens(rows: Sequence[Sized]) -> tuple[int, ...]:
    """Tokens of at most STANDING_ROWS rows, evenly chosen among all by length, the longest among them; shortest
    first."""
    lengths = sorted(map(len, rows))
    count = min(STANDING_ROWS, len(lengths))
    return tuple(lengths[(number + 1) * len(lengths) // count - 1] for number in range(count))


def average_document_tokens(rows: Sequence[TokenizedRow]) -> float | None:
    """Of the document that a token is in: sum(n^2) / sum(n); None where rows are not packed."""
    lengths = [tokens for row in rows for tokens in row.documents or ()]
    return sum(tokens * tokens for tokens in lengths) / sum(lengths) if lengths else None


def load_plan(path: Path) -> Plan:
    """A saved plan; PlanError where it cannot be read."""
    try:
        return Plan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise PlanError(f"{path}: not a plan of this version of fitune: {where}{first['msg']}") from error


def reopen_plan(path: Path) -> tuple[Job, Plan, tuple[str, ...]]:
    """The job of a saved plan, the plan, and warnings; PlanError where recipe, model or device differ from its own."""
    plan = load_plan(path)
    written = Path(plan.recipe)
    beside = path.parent / written
    recipe_path = plan.recipe if written.exists() or not beside.exists() else str(beside)
    try:
        job = Job(recipe_path, plan.overrides)
    except FituneError as error:
        raise PlanError(f"{path}: stale: its recipe {plan.recipe} cannot be used any more: {error}") from error
    device = job.probe_device()
    found = {
        "the recipe": (plan.recipe_sha256, job.recipe_file.sha256),
        "the model's config": (plan.model.config_sha256, job.source.config_sha256),
        "the device": (_describe_device(plan), f"{device.name}, {device.memory_bytes:,} bytes"),
    }
    changed = [f"{what} was {was}, now {now}" for what, (was, now) in found.items() if was != now]
    if changed:
        raise PlanError(
            f"{path}: stale: {'; '.join(changed)}: make a new plan with "
            f"`{shlex.join(['fitune', 'plan', plan.recipe, '-o', str(path)])}`"
        )
    installed = find_versions()
    warnings = tuple(
        f"planned with {name} {version}, running with {installed.get(name, 'none')}"
        for name, version in plan.versions.items()
        if installed.get(name) != version
    )
    return job, plan, warnings


def _describe_device(plan: Plan) -> str:
    return f"{plan.device.name}, {plan.device.memory_bytes:,} bytes"


def check_data_fits_plan(job: Job, plan: Plan) -> None:
    """PlanError where the dataset has a longer row than the plan allows for."""
    longest = job.data.longest_row_tokens
    if longest > plan.data.sequence_length:
        raise PlanError(
            f"stale: the plan allows for rows of {plan.data.sequence_length:,} tokens, the dataset's longest has "
            f"{longest:,}: make a new plan"
        )


def validate_job(job: Job) -> str:
    """Check everything that needs no weights and no device: model, targets, rows; says what was found."""
    source, shape, recipe = job.source, job.shape, job.recipe_file.recipe
    if recipe.method.kind != "full":
        shape.lora_linears(recipe.method.targets)
    if recipe.budget.gpu is not None:
        find_gpu(recipe.budget.gpu)
    loaded = job.rows
    formats = ", ".join(dict.fromkeys(source.format for source in loaded.train))
    read = " of a stream" if recipe.data.streaming else ""
    return (
        f"{source.id} ({source.kind}), {len(loaded.train_rows):,} rows{read} to train on ({formats}), "
        f"{len(loaded.eval_rows):,} held out"
        + (f", {sum(len(one.rows) for one in loaded.forgetting):,} of another task" if loaded.forgetting else "")
    )
