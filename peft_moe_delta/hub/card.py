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

from huggingface_hub import ModelCard, ModelCardData

from ..errors import CardError
from .licence import OTHER, UNKNOWN, licence_for, licence_of

FACTS_FILE, PLAN_FILE, GRAFT_FILE, CARD_FILE = "card.json", "plan.json", "graft.json", "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")

ADAPTER, GRAFTED, MODEL = "adapter", "grafted adapter", "model"
_LIBRARIES = {ADAPTER: "peft", GRAFTED: "peft", MODEL: "transformers"}


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
        data: what it was trained on, in the author's words.
        limits: what a user must know, in the author's words, beside what the facts imply.
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
    data: str | None = None
    limits: list[str] = field(default_factory=list)
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
            CardError: neither an adapter nor a checkpoint, or a licence that is laxer than a parent's.
        """
        folder = Path(folder)
        config = _read(folder / "config.json")
        own = _read(folder / "adapter_config.json")
        settings = own or (_read(Path(adapter) / "adapter_config.json") if adapter else None) or {}
        if config is None and own is None:
            raise CardError(f"{folder} holds neither adapter_config.json nor config.json: no model to describe.")
        graft = _read(folder / GRAFT_FILE) or settings.get("graft")
        named = settings.get("base_model_name_or_path")
        grafted = bool(own and own.get("graft"))
        if grafted:  # its own base is the post-trained model
            post_trained, named = post_trained or base_model or named, None
        base = base_model if not grafted else None
        base = base or named
        post_trained = post_trained or (graft or {}).get("post_trained")
        ancestors = {model: (parents or {}).get(model) or licence_of(model) for model in (base, post_trained) if model}
        return cls(
            name=name,
            kind=(GRAFTED if grafted else ADAPTER) if own else MODEL,
            parents=ancestors,
            licence=licence_for(ancestors, licence),
            base_model=base,
            post_trained=post_trained,
            languages={code: settings["languages"][code] for code in settings.get("language_ids") or ()},
            architecture=None if own else (config or {}).get("architectures", [None])[0],
            adapter={key: settings[key] for key in ("routing", "top_k", "expert_rank", "experts") if key in settings},
            plan=_read(folder / PLAN_FILE) or (_read(Path(adapter) / PLAN_FILE) if adapter else None),
            graft=graft,
            **further,
        )

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
        except (TypeError, ValueError) as error:
            raise CardError(f"Not the facts of a card: {error}. Expected the JSON that `card` writes.") from error
        licence_for(facts.parents, facts.licence)
        return facts


def render_card(facts: CardFacts) -> str:
    """The card: metadata and text. The same facts give the same card, to the byte."""
    relation = {ADAPTER: "adapter", GRAFTED: "adapter", MODEL: "merge"}[facts.kind]
    bases = [facts.post_trained] if facts.kind == GRAFTED else [facts.base_model, facts.post_trained]
    metadata = ModelCardData(
        base_model=list(dict.fromkeys(model for model in bases if model)) or None,
        base_model_relation=relation if any(bases) else None,
        language=_language_tags(facts.languages) or None,
        library_name=_LIBRARIES[facts.kind],
        license=facts.licence,
        license_name="see-the-parents" if facts.licence == OTHER else None,
        model_name=facts.name,
        pipeline_tag="text-generation",
        tags=["peft-moe-delta", "mixture-of-experts", "multilingual"],
    )
    card = ModelCard.from_template(metadata, template_path=str(TEMPLATE), facts=facts, unknown=UNKNOWN, other=OTHER)
    return str(card).rstrip() + "\n"


def _language_tags(languages: Mapping[str, str]) -> list[str]:
    """Codes as the Hub writes them (ISO 639); what is none, such as a domain's name, is left out."""
    heads = [re.split(r"[-_]", code)[0].lower() for code in languages]
    return list(dict.fromkeys(head for head in heads if re.fullmatch(r"[a-z]{2,3}", head)))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
