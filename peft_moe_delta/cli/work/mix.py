"""`mix`, carried out."""

from __future__ import annotations

from argparse import Namespace

from ...checkpoint import whole_folder
from ...mixing import fit_routers, mix
from ...sources import read_texts
from ..options import pairs_of


def run(arguments: Namespace) -> str:
    others = arguments.others
    if "=" in others:
        others = pairs_of("--others", others.split(","), float)
    given = pairs_of("--text", arguments.text)
    texts = {code: read_texts(path, language=code) for code, path in given.items()}  # before anything is written
    options = {} if arguments.attention_experts is None else {"attention_experts": arguments.attention_experts}
    with whole_folder(arguments.output) as folder:
        model = mix(
            arguments.seed,
            pairs_of("--branch", arguments.branch),
            pairs_of("--language", arguments.language) or None,
            others=others,
            base_output=arguments.base_output,
            routing=arguments.routing,
            top_k=arguments.top_k,
            **options,
        )
        if texts:
            fit_routers(model, texts).save(folder / "router_statistics.safetensors")
        model.save_pretrained(str(folder))
    return f"adapter: {arguments.output}\nits base: {model.active_peft_config.base_model_name_or_path}"
