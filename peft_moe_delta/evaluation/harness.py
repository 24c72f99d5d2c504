"""lm-evaluation-harness runs adapters: its own Hugging Face model, with a language for every task.

In: requests of `lm_eval`, each of which knows its task. Out: what `lm_eval`'s `hf` model answers, computed with the
experts of the task's language. Importing this module registers the model as `moe_delta`; needs the extra `lm-eval`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from fnmatch import fnmatch
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftConfig, PeftModel
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing

from ..errors import DataError
from ..languages import LanguageTable, closest_code, closest_code_in_name
from ..padding import beginning_of_prompt
from ..tuner import MoeDeltaConfig, MoeDeltaTuner
from ..tuner.identifier import AUTO
from .loading import with_learnt_tokens, with_tokenizer


@register_model("moe_delta")
class MoeDeltaLM(HFLM):
    """`lm_eval`'s `hf` model for adapters of this package, and for any other model `hf` runs.

    A task's language is, in this order: what `task_languages` says, a language in the task's name (`belebele_hun_Latn`,
    `arc_hu`, `global_mmlu_el`; of a translation the target, `flores_en-hu`), `language`. It chooses experts under
    routing by language and is not needed under learned routing.

    Text begins as in our own scores (`padding`). A prompt begins with bos, which `hf` leaves to the tokenizer, unless
    `add_bos_token=False` says otherwise. Of a text that is scored whole, bos is context; `hf` scores it as well
    where the tokenizer adds it.

    Args:
        pretrained, peft, ...: as for `hf`.
        language: of the tasks that name none.
        task_languages: task name or pattern -> code; on a command line `"pattern:code;pattern:code"`.

    Raises:
        LanguageError: a code that the adapter does not know.
        DataError: routing by language, and a task without a language.
    """

    tokenizer: Any
    add_bos_token: bool | None
    _model: Any

    def __init__(
        self,
        *args: Any,
        language: str | None = None,
        task_languages: Mapping[str, str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        self._adapter: str | None = kwargs.get("peft")
        super().__init__(*args, **kwargs)
        self.tokenizer = _beginning_with_bos(with_learnt_tokens(self.tokenizer, self.model))
        tuner = getattr(self.model, "base_model", None)
        self._tuner = tuner if isinstance(tuner, MoeDeltaTuner) else None
        self._language = language
        self._task_languages = _read_map(task_languages)
        if self._tuner is not None:
            table = self._tuner.active_config.language_table
            for code in [*self._task_languages.values(), *([language] if language not in (None, AUTO) else [])]:
                table.id_of(closest_code(code, table.codes) or code)
            if language not in (None, AUTO):
                self._language = closest_code(language, table.codes)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
        """The adapter's own tokenizer before its base model's."""
        if tokenizer is None and self._adapter is not None:
            tokenizer = with_tokenizer(self._adapter)
        super()._create_tokenizer(pretrained, tokenizer, **kwargs)

    def _create_model(self, pretrained: str, *, peft: str | None = None, **kwargs: Any) -> None:
        """`hf` resizes a base model to its adapter's tokenizer, which takes padded rows away from the base's softmax.
        Ours bring their own rows: the base stays as it is."""
        if peft is None or not isinstance(PeftConfig.from_pretrained(peft), MoeDeltaConfig):
            return super()._create_model(pretrained, peft=peft, **kwargs)
        super()._create_model(pretrained, **kwargs)
        self._model = PeftModel.from_pretrained(self._model, peft, revision=kwargs.get("revision"))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._by_language(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return self._by_language(super().loglikelihood_rolling, requests, disable_tqdm)
        finally:
            self.add_bos_token = before

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._by_language(super().generate_until, requests, disable_tqdm)

    def language_of(self, task: str) -> str | None:
        """The language whose experts a task runs on; None where it has none and needs none.

        Raises:
            DataError: see above.
        """
        if self._tuner is None:
            return None
        if self._language == AUTO:
            return AUTO
        config = self._tuner.active_config
        language = language_of_task(task, config.language_table, self._task_languages) or self._language
        if language is None and config.must_be_told:
            raise DataError(
                f"The task {task!r} names none of the adapter's languages ({', '.join(config.language_table.codes)}), "
                "and this adapter routes by language. Pass task_languages=PATTERN:CODE;... or language=CODE among the "
                "model's arguments."
            )
        return language

    def _by_language(
        self, answer: Callable[[list[Instance], bool], list[Any]], requests: list[Instance], disable_tqdm: bool
    ) -> list[Any]:
        """Requests answered language by language, in the order they came in."""
        groups: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self.language_of(request.task_name or ""), []).append(index)
        answers: list[Any] = [None] * len(requests)
        for language, indices in groups.items():
            with nullcontext() if self._tuner is None else self._tuner.in_language(language):
                found = answer([requests[index] for index in indices], disable_tqdm)
            for index, value in zip(indices, found, strict=True):
                answers[index] = value
        return answers


def _beginning_with_bos(tokenizer: Any) -> Any:
    """The tokenizer, or one like it that adds the beginning of a prompt by itself."""
    first = beginning_of_prompt(tokenizer)
    if not first or tokenizer("a")["input_ids"][:1] == first:
        return tokenizer
    adding = copy.deepcopy(tokenizer)  # the caller's own stays as it is
    backend, bos = adding.backend_tokenizer, tokenizer.bos_token
    template = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, first[0])])
    backend.post_processor = ProcessorSequence([*filter(None, [backend.post_processor]), template])
    return adding


def language_of_task(task: str, table: LanguageTable, task_languages: Mapping[str, str] | None = None) -> str | None:
    """The language of a task, one of the table's codes: as `task_languages` says, else by the task's name."""
    for pattern, code in (task_languages or {}).items():
        if fnmatch(task, pattern):
            return closest_code(code, table.codes)
    return closest_code_in_name(task, table.codes)


def _read_map(given: Mapping[str, str] | str | None) -> dict[str, str]:
    """`task_languages` in either of its forms.

    Raises:
        DataError: a part that is not `pattern:code`.
    """
    if not isinstance(given, str):
        return dict(given or {})
    pairs = [part.rpartition(":") for part in given.split(";") if part]
    if not all(pattern and code for pattern, _, code in pairs):
        raise DataError(f"task_languages: got {given!r}, expected PATTERN:CODE;PATTERN:CODE, such as belebele_*:hu.")
    return {pattern: code for pattern, _, code in pairs}
