"""The model card: what a model is, what it was made from and how, what was measured, what it must not be trusted with.

In: `CardFacts`, plain values that lie as `card.json` beside the card, and the evaluation's report. Out: the card's
text, with metadata that the Hub reads: languages, base models, licence, and the report's numbers as its `model-index`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..engines import START
from ..errors import CardError, PlanError
from ..evaluation.page import tables
from ..evaluation.report import METRICS, TEXT, EvalReport
from ..evaluation.verdict import judge, verdict
from ..files import read_text, write_text
from ..languages import ORIGINAL_GROUP, closest_code, read_code
from ..tuner.record import AdapterRecord
from .licence import OTHER, UNKNOWN, licence_for, licence_of

FACTS_FILE, PLAN_FILE, GRAFT_FILE, CARD_FILE = "card.json", "plan.json", "graft.json", "README.md"
MANIFEST_FILE, SERVED_FILE = "manifest.json", "served.json"
TEMPLATE = Path(__file__).with_name("card_template.md")

_ADAPTER_FIELDS = ("routing", "top_k", "expert_rank", "experts")
ADAPTER, GRAFTED, MODEL = "adapter", "grafted adapter", "model"
KEPT = ("better", "kept")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is rendered from.

    Attributes:
        name: title of the card.
        kind: `"adapter"` over the base model, `"grafted adapter"` over the post-trained one, or stand-alone `"model"`.
        parents: every model that weights come from -> its licence; None where it is not known.
        licence: of this model; see `licence_for`.
        base_model: what the experts were trained on; None where the files do not say.
        post_trained: what was grafted on; None for an adapter over the base.
        languages: code -> group.
        architecture: class name of a stand-alone model.
        adapter: fields of the adapter's config: routing, top_k, expert_rank, experts.
        plan: `ExpertPlan` as JSON.
        training: one row a stage: what it was, its settings, the last losses of its log.
        graft: `GraftReport` as JSON.
        doubts: why its training or its graft is doubtful.
        data: what it was trained on, in the author's words.
        limits: what a user must know, in the author's words, beside what the facts imply.
        measured_as: name of this model in the report.
        served: engines that answer as the model does in transformers, as `verify-served --record` keeps them.
        command: the command line that made it.
        versions: package -> version.
    """

    name: str
    kind: str
    parents: dict[str, str | None]
    licence: str
    base_model: str | None = None
    post_trained: str | None = None
    languages: dict[str, str] = field(default_factory=dict)
    architecture: str | None = None
    adapter: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    graft: dict[str, Any] | None = None
    doubts: list[str] = field(default_factory=list)
    data: str | None = None
    limits: list[str] = field(default_factory=list)
    measured_as: str | None = None
    served: list[dict[str, Any]] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: str | Path,
        *,
        name: str,
        adapter: str | Path | None = None,
        base_model: str | None = None,
        post_trained: str | None = None,
        parents: Mapping[str, str | None] | None = None,
        licence: str | None = None,
        **further: Any,
    ) -> CardFacts:
        """What the files of a model say about it.

        Args:
            folder: the model: an adapter's folder or a checkpoint's.
            name: title of the card.
            adapter: folder of the adapter that a stand-alone model was made from.
            base_model, post_trained: what to call them; None for what the files call them.
            parents: licences of the parents that their own cards do not state.
            licence: what to state; None for the strictest of the parents'.
            further: fields as in the class.

        Raises:
            CardError: neither an adapter nor a checkpoint, damaged files, or a licence laxer than a parent's.
            CheckpointError: an adapter that a newer version of this package saved.
        """
        folder = Path(folder)
        try:
            config = _read(folder / "config.json")
            own = _read(folder / "adapter_config.json")
            job = _read(folder / MANIFEST_FILE) or {}  # of a streamed graft: what was asked for, and its report
            request = job.get("request", {})
            adapter = adapter or request.get("adapter")
            settings = own or (_read(Path(adapter) / "adapter_config.json") if adapter else None) or {}
            record = AdapterRecord.of(settings)
            if config is None and own is None:
                raise CardError(f"{folder} holds neither adapter_config.json nor config.json: no model to describe.")
            graft = _read(folder / GRAFT_FILE) or job.get("report") or record.graft
            named = settings.get("base_model_name_or_path") or request.get("base")
            post_trained = post_trained or (graft or {}).get("post_trained")
            grafted = bool(own and record.graft)
            if grafted:  # what such an adapter lies over is the post-trained model
                post_trained, base = base_model or post_trained or named, None
            else:
                base = base_model or named
            ancestors = _licences([model for model in (base, post_trained) if model], parents or {})
            if graft is not None:
                graft = {**graft, "post_trained": public_name(graft["post_trained"])}
            return cls(
                name=name,
                kind=(GRAFTED if grafted else ADAPTER) if own else MODEL,
                parents=ancestors,
                licence=licence_for(ancestors, licence),
                base_model=base and public_name(base),
                post_trained=post_trained and public_name(post_trained),
                languages={code: settings["languages"][code] for code in record.language_ids},
                architecture=None if own else (config or {}).get("architectures", [None])[0],
                adapter={key: settings[key] for key in _ADAPTER_FIELDS if key in settings},
                plan=_read(folder / PLAN_FILE) or (_read(Path(adapter) / PLAN_FILE) if adapter else None),
                graft=graft,
                served=verified_in(folder),
                doubts=list(dict.fromkeys([*record.doubts, *doubts_of(graft or {})])),
                **further,
            )
        except (AttributeError, IndexError, KeyError, TypeError, PlanError) as error:
            raise CardError(f"A config or record in {folder} is damaged: {error!r}. Save the model again.") from error

    def to_json(self) -> str:
        """The facts as a JSON document that `from_json` reads back."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CardFacts:
        """Read what `to_json` wrote.

        Raises:
            CardError: it is something else, or its licence is laxer than a parent's.
        """
        try:
            facts = cls(**json.loads(text))
        except (AttributeError, TypeError, ValueError) as error:
            raise CardError(f"Not the facts of a card: {error}. Expected the JSON that `card` writes.") from error
        stated = [facts.licence, *facts.parents.values()] if isinstance(facts.parents, dict) else [0]
        if not all(licence is None or isinstance(licence, str) for licence in stated):
            raise CardError(f"Not the facts of a card: parents are {facts.parents!r:.60}, expected model -> licence.")
        licence_for(facts.parents, facts.licence)
        return facts


def render_card(facts: CardFacts, report: EvalReport | None = None) -> str:
    """The card: metadata and text. The same facts and report give the same card, to the byte.

    Raises:
        CardError: the report has no model called `facts.measured_as`, or no such name is given.
    """
    measured_as = facts.measured_as or ""
    if report is not None and measured_as not in [model.name for model in report.models]:
        names = ", ".join(repr(model.name) for model in report.models)
        raise CardError(
            f"The card's model is called {facts.measured_as!r} in no row of the report, which has {names}. Say which "
            "of them it is: measured_as=..., on the command line --measured-as."
        )
    bases = [facts.post_trained] if facts.kind == GRAFTED else [facts.base_model, facts.post_trained]
    published = list(dict.fromkeys(model for model in bases if model and "/" in model))
    metadata = ModelCardData(
        base_model=published or None,
        base_model_relation=_relation(facts.kind, published) if published else None,
        eval_results=_eval_results(report, measured_as) if report else None,
        language=_language_tags(facts.languages) or None,
        library_name="transformers" if facts.kind == MODEL else "peft",
        license=facts.licence,
        license_name="see-the-parents" if facts.licence == OTHER else None,
        model_name=facts.name if report else None,
        pipeline_tag="text-generation",
        tags=["peft-moe-delta", "mixture-of-experts", "multilingual"],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        facts=facts,
        unknown=UNKNOWN,
        other=OTHER,
        tables=tables(report, measured_as) if report else [],
        verdict=(verdict(report, measured_as) if report else None) or "",
        definitions=report.definitions() if report else [],
        kept=kept_languages(facts, report),
        served=[_served_row(facts.name, row) for row in facts.served],
        warnings=[warning for warning in report.warnings if warning not in facts.doubts] if report else [],
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def write_card(folder: str | Path, facts: CardFacts, report: EvalReport | None = None) -> Path:
    """Write the card, and beside it what it is rendered from: `card.json` and `report.json`. Returns the card."""
    folder = Path(folder)
    text = render_card(facts, report)
    write_text(folder / FACTS_FILE, facts.to_json())
    if report is not None:
        report.save(folder)
    write_text(folder / CARD_FILE, text)
    return folder / CARD_FILE


def _eval_results(report: EvalReport, model: str) -> list[EvalResult]:
    """The scores of a model of the report, one result each."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", score.task.lower()).strip("-"),
            dataset_name=score.task if score.language is None else f"{score.task} ({score.language})",
            dataset_config=score.language,
            metric_type=score.metric,
            metric_name=METRICS[score.metric].label if score.metric in METRICS else score.metric,
            metric_value=score.value,
        )
        for score in report.scores
        if score.model == model
    ]


def kept_languages(facts: CardFacts, report: EvalReport | None) -> list[str]:
    """Original languages that the report shows to be kept: their text and all tasks are, as in its verdict, and their
    routes did not drift, or cannot. What was not measured, or not enough of, is not claimed."""
    if report is None or not report.references or report.warnings:
        return []
    reference, ours = report.references[0], facts.measured_as
    differences = [d for d in report.differences if (d.model, d.reference) == (ours, reference)]
    skills = [d for d in differences if d.task != TEXT and d.status != "expanded"]
    if not skills or any(judge(report, d) not in KEPT for d in skills):
        return []
    fixed = facts.adapter.get("routing") in ("language", "context")  # neither reads what a graft changes
    routed = {row.language for row in report.agreement if row.model == ours}
    text = {d.language: judge(report, d) for d in differences if d.task == TEXT}
    return [
        code
        for code, group in facts.languages.items()
        if group == ORIGINAL_GROUP
        and text.get(closest_code(code, filter(None, text))) in KEPT
        and (fixed or closest_code(code, routed))
    ]


def verified_in(folder: str | Path) -> list[dict[str, Any]]:
    """The engines that a model was verified in, by the record in its folder; none where there is no record.

    Raises:
        CardError: the record is damaged.
    """
    rows = (_read(Path(folder) / SERVED_FILE) or {}).get("verified", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"engine", "form"} <= set(row) for row in rows):
        raise CardError(f"{SERVED_FILE} in {folder} is damaged. Remove it, and run `verify-served --record` again.")
    return rows


def _served_row(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """A verified engine as the card says it."""
    start = START.get(row["engine"], "").format(model=f"user/{name}", form=row["form"])
    difference, allowed = row.get("difference"), row.get("tolerance")
    return {
        "engine": f"{row['engine']} {row.get('version') or ''}".strip(),
        "form": row["form"],
        "difference": "not compared" if difference is None else f"{difference:.1g}, of {allowed:.1g} allowed",
        "languages": ", ".join(row.get("languages") or []),
        "start": f"`{start}`" if start else "",
    }


def doubts_of(graft: Mapping[str, Any]) -> list[str]:
    """What a graft's report says against it, and its calibration's."""
    return [*(graft.get("warnings") or ()), *((graft.get("calibration") or {}).get("doubts") or ())]


def public_name(model: str) -> str:
    """A Hub id as it is; of a folder of this machine the last part alone, which others can do nothing with either."""
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) and not Path(model).exists()
    return model if is_id else Path(model).name


def _licences(models: list[str], stated: Mapping[str, str | None]) -> dict[str, str | None]:
    """Public name -> licence: as stated, by either name, or as the model's own card says."""
    return {public_name(m): stated.get(m) or stated.get(public_name(m)) or licence_of(m) for m in models}


def _relation(kind: str, published: list[str]) -> str:
    """The Hub's word for how this model relates to those."""
    if kind != MODEL:
        return "adapter"
    return "merge" if len(published) > 1 else "finetune"


def _language_tags(languages: Mapping[str, str]) -> list[str]:
    """Codes as the Hub writes them, the shortest of ISO 639; what is none, such as a domain's name, is left out."""
    return list(dict.fromkeys(str(tag.language) for code in languages if (tag := read_code(code)) is not None))


def _read(path: Path) -> dict[str, Any] | None:
    """The fields of a JSON file; None where there is none.

    Raises:
        CardError: it holds something else.
    """
    if not path.is_file():
        return None
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CardError(f"{path} is no JSON file: {error}. Fetch or make it again.") from error
    if not isinstance(data, dict):
        raise CardError(f"{path} holds no fields, but {type(data).__name__}. Fetch or make it again.")
    return data
