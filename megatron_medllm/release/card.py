"""README.md of a release: a model card in the hub's format, from what the run's own files say."""

from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_medllm.config.corpus import SourceConfig
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.errors import UserError
from megatron_medllm.pages.markdown import markdown_table
from megatron_medllm.pages.numbers import count
from megatron_medllm.release.card_exam import exam_section, model_index
from megatron_medllm.release.card_training import training_section
from megatron_medllm.release.chain import exam_summary
from megatron_medllm.release.finished_run import FinishedRun
from megatron_medllm.release.licences import BaseModel, Licence, restricts

NOT_STATED = "not stated"


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond the run's files; `source_licences` by the name of a source or an exam."""

    name: str
    base: BaseModel | None
    licence: Licence | None
    chain_digest: str
    has_chat_template: bool
    end_tokens: Any
    not_compared: list[str]
    languages: tuple[str, ...] = ("ja",)
    hardware: str | None = None
    source_licences: dict[str, str] = field(default_factory=dict)


def model_card(run: FinishedRun, facts: CardFacts) -> str:
    """The whole file.

    Raises:
        UserError: `facts` names the licence of a source that the run does not have.
    """
    summary = exam_summary(run)
    rows = data_rows(run, summary, facts.source_licences)
    metadata = yaml.safe_dump(card_metadata(run, facts, summary), allow_unicode=True, sort_keys=False, width=120)
    lines = [
        f"# {facts.name}",
        "",
        *_introduction(run, facts),
        *_use(run),
        *_loading(run, facts),
        *exam_section(run, summary),
        *_data(rows),
        *_contamination(run, summary),
        *training_section(run, hardware=facts.hardware),
        *_licence(facts),
        *_provenance(facts),
    ]
    return f"---\n{metadata}---\n\n" + "\n".join(lines) + "\n"


def card_metadata(run: FinishedRun, facts: CardFacts, summary: dict[str, Any]) -> dict[str, Any]:
    """The block that the hub reads."""
    found: dict[str, Any] = {}
    if facts.base is not None and facts.base.hub_id is not None:
        found |= {"base_model": facts.base.hub_id, "base_model_relation": "finetune"}
    found["language"] = list(facts.languages)
    found |= {} if facts.licence is None else facts.licence.metadata()
    found |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    datasets = [source.dataset for source in _sources(run) if source.dataset and not run.place(source.dataset).exists()]
    found |= {"datasets": list(dict.fromkeys(datasets))} if datasets else {}
    tags = ["medical", *(["continued-pretraining"] if "cpt" in run.lineage() else []), "megatron-core"]
    trained = run.section(run.model)
    if isinstance(trained, RpoConfig):
        tags += ["preference-optimization", trained.loss.kind]
    found["tags"] = tags
    found["model-index"] = model_index(facts.name, summary)
    return found


def _sources(run: FinishedRun) -> list[SourceConfig]:
    return [
        source
        for name in run.corpora()
        if name in run.config.corpora
        for source in run.config.corpora[name].sources.values()
    ]


def _introduction(run: FinishedRun, facts: CardFacts) -> list[str]:
    start = "random weights" if facts.base is None else facts.base.name
    if facts.base is not None and facts.base.hub_id is not None:
        start = f"[{facts.base.hub_id}](https://huggingface.co/{facts.base.hub_id})"
    steps = {"base": "pretraining", "cpt": "continued pretraining on medical text"}
    names = [steps.get(name, f"preference optimization ({name})") for name in run.lineage()]
    lines = [f"A causal language model: {start}, then {', then '.join(names)}, with megatron_medllm.", ""]
    if facts.base is not None and facts.base.licence is not None and facts.base.licence.notice:
        lines += ["**Improved using Qwen.**", ""]
    if run.config.demo is not None:
        lines += [
            "> **What this model learned is invented**: diseases, drugs, tests and towns are random strings.",
            "",
        ]
    return lines


def _use(run: FinishedRun) -> list[str]:
    return [
        "## Intended use",
        "",
        "Research on language models that answer Japanese medical questions, with and without an explanation.",
        "",
        "**This is no medical device. Do not use it for diagnosis, treatment or triage, nor as advice to patients.** "
        "Its answers and explanations may be wrong while they sound right, and exams say little about practice. "
        "Whoever builds on it must test it for the use at hand, with people who are qualified to judge.",
        "",
        "本モデルは研究用であり、医療機器ではありません。診断・治療・トリアージや患者への助言には使用しないでください。",
        "",
    ]


def _loading(run: FinishedRun, facts: CardFacts) -> list[str]:
    prompt = run.config.eval.prompt if run.config.eval is not None else None
    asked = (
        ""
        if prompt is None
        else f" The exam below used the prompt set `{prompt.template}`"
        + (" through the chat template." if prompt.chat else " as plain text.")
    )
    trained = run.section(run.model)
    template = getattr(trained, "template", "plain")
    style = (
        f"Preference training put {'turns of the chat template' if template == 'chat' else 'plain text'} to it."
        if run.round_suffix(run.model) is not None
        else "It was trained on running text."
    )
    ask = (
        'text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], '
        "tokenize=False, add_generation_prompt=True)"
        if template == "chat" and facts.has_chat_template
        else "text = prompt"
    )
    chat = "comes with a" if facts.has_chat_template else "has no"
    return [
        "## How to load it",
        "",
        f"{style}{asked} The tokenizer {chat} chat template. Generation ends at token {_ids(facts.end_tokens)}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'path = "{facts.name}"  # a folder, or OWNER/NAME on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")',
        'prompt = "…"',
        ask,
        'inputs = tokenizer(text, return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=512)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        "```",
        "",
        "With [vLLM](https://docs.vllm.ai):",
        "",
        "```bash",
        f"vllm serve {facts.name}",
        "```",
        "",
    ]


def _ids(tokens: Any) -> str:
    return " or ".join(str(token) for token in (tokens if isinstance(tokens, list) else [tokens]))


def data_rows(run: FinishedRun, summary: dict[str, Any], licences: dict[str, str]) -> list[dict[str, Any]]:
    """What the model learned from, and its exam: `corpus`, `source`, `licence`, `documents`, `tokens`, `share`.

    Raises:
        UserError: `licences` names something else.
    """
    rows: list[dict[str, Any]] = []
    for corpus in run.corpora():
        for name, facts in run.manifest(corpus)["sources"].items():
            licence = licences.get(name) or facts.get("licence") or NOT_STATED
            share = f"{facts['weight']:.1%}"
            row = {"corpus": corpus, "source": name, "licence": licence, "share": share}
            rows.append(row | {"documents": facts["documents"], "tokens": facts["tokens"]})
    if run.config.pairs is not None and any(run.round_suffix(name) is not None for name in run.lineage()):
        questions = run.config.pairs.questions.name
        row = {"corpus": "preference pairs", "source": questions, "licence": licences.get(questions) or NOT_STATED}
        rows.append(row | {"documents": None, "tokens": None, "share": "–"})
    row = {"corpus": "exam (asked, not learned)", "source": summary["exam"], "share": "–"}
    rows.append(row | {"licence": licences.get(summary["exam"]) or NOT_STATED, "documents": None, "tokens": None})
    known = {row["source"] for row in rows}
    unknown = next((name for name in licences if name not in known), None)
    if unknown is not None:
        raise UserError(f"--source-licence {unknown}: no such source or exam (there are: {', '.join(sorted(known))})")
    return rows


def restricted_sources(rows: list[dict[str, Any]]) -> list[str]:
    """`NAME (LICENCE)` of the sources whose licence reads as a restriction of what is made of them."""
    return [f"{row['source']} ({row['licence']})" for row in rows if restricts(row["licence"])]


def _data(rows: list[dict[str, Any]]) -> list[str]:
    cells = [
        [row["corpus"], row["source"], row["licence"], count(row["documents"]), count(row["tokens"]), row["share"]]
        for row in rows
    ]
    lines = ["## Data", "", *markdown_table(["corpus", "source", "licence", "documents", "tokens", "share"], cells), ""]
    untold = [row["source"] for row in rows if row["licence"] == NOT_STATED]
    if untold:
        lines += [f"The licence of {', '.join(dict.fromkeys(untold))} was not stated by whoever trained the model.", ""]
    if limited := restricted_sources(rows):
        lines += [f"These licences restrict use, perhaps that of this model too: {', '.join(limited)}.", ""]
    return lines


def _contamination(run: FinishedRun, summary: dict[str, Any]) -> list[str]:
    lines = ["## Was the exam in the data?", ""]
    for corpus in run.corpora():
        manifest = run.manifest(corpus)
        settings = manifest.get("built_from", {}).get("config", {}).get("decontaminate", {})
        if not settings.get("exams"):
            lines.append(f"- corpus {corpus}: NOT checked against any exam.")
            continue
        hits = sum(facts.get("contaminated_documents", 0) for facts in manifest["sources"].values())
        lines.append(
            f"- corpus {corpus}: checked against {len(settings['exams'])} places of questions "
            f"({settings['match_chars']} characters alike, or {settings['coverage']:.0%} of a question); "
            f"{count(hits)} documents found, action: {settings['action']}."
        )
    for training in run.lineage():
        suffix = run.round_suffix(training)
        if suffix is None:
            continue
        if run.config.pairs is None:
            lines.append("- preference pairs: NOT checked here; they came from elsewhere.")
            continue
        found = run.pairs_manifest(suffix)["contamination"]
        done = (
            f"checked against the exam; questions dropped: {len(found['dropped'])}"
            if found["checked"]
            else "NOT checked"
        )
        lines.append(f"- preference pairs{suffix}: {done}.")
    return [*lines, ""]


def _licence(facts: CardFacts) -> list[str]:
    licence = facts.licence
    if licence is None:
        text = "Not stated."
    else:
        title = f"[{licence.title}]({licence.link})" if licence.link else licence.title
        text = f"{title} (`{licence.identifier}`)."
    if facts.base is not None and facts.base.licence is not None:
        text += f" The base model, {facts.base.name}, is under `{facts.base.licence.identifier}`."
    return ["## Licence", "", f"{text} The data's licences stand in the table above.", ""]


def _provenance(facts: CardFacts) -> list[str]:
    lines = [
        "## Provenance",
        "",
        "`provenance.json` holds digests of every stage's files, from the text to the exam, and of every file "
        "here. `medllm release verify DIR --run RUN` reads them all again.",
        "",
        f"Digest of the chain: `{facts.chain_digest}`",
        "",
    ]
    if facts.not_compared:
        lines += [f"Not compared: {'; '.join(facts.not_compared)}.", ""]
    return lines
