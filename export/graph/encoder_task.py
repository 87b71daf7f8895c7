"""The models that are exported by torch.onnx (encoders, GPT-2), and the transformers class to trace for a task."""

from __future__ import annotations

from collections.abc import Mapping

from adapter_merge.errors import Problem, UnsupportedError, raise_all
from adapter_merge.storage.checkpoint import Checkpoint

from .factor_folder import Factors

# model_type -> first part of the names of transformers' classes
FAMILIES: Mapping[str, str] = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "mpnet": "MPNet",
    "distilbert": "DistilBert",
    "modernbert": "ModernBert",
    "deberta-v2": "DebertaV2",
}
TASKS: Mapping[str, tuple[str, ...]] = {  # class -> weights whose rows are its labels
    "ForSequenceClassification": ("classifier.weight", "classifier.out_proj.weight"),
    "ForTokenClassification": ("classifier.weight",),
    "ForQuestionAnswering": ("qa_outputs.weight",),
}
MASKED = "ForMaskedLM"
BODY = "Model"
GPT2 = "GPT2LMHeadModel"
ENCODERS = tuple(family + end for family in FAMILIES.values() for end in (*TASKS, MASKED, BODY, "ForPreTraining"))
TRACED = (GPT2, *ENCODERS)
HEADS = ("classifier.", "qa_outputs.", "pooler.", "pre_classifier.", "head.")  # modules between the body and the labels


def task_class(checkpoint: Checkpoint, factors: Mapping[str, Factors], body: bool = False) -> str:
    """Return the transformers class to trace.

    body: return the class without a head. Otherwise it is the checkpoint's class where that has a head for a task, then
    the class of the adapters' heads, then the checkpoint's class (its masked language model, for a checkpoint of
    ForPreTraining).
    """
    architecture = str((checkpoint.config.get("architectures") or [""])[0])
    if architecture == GPT2:
        return architecture
    family = FAMILIES[checkpoint.config["model_type"]]
    if body:
        return family + BODY
    if architecture.endswith(tuple(TASKS)):
        return architecture
    replaced = {name for value in factors.values() for name in value.replacements}
    if "qa_outputs.weight" in replaced:
        return family + "ForQuestionAnswering"
    if replaced & {"classifier.weight", "classifier.out_proj.weight"}:
        return family + "ForSequenceClassification"
    return family + (BODY if architecture == family + BODY else MASKED)


def is_body(name_of_class: str) -> bool:
    """Return True for a class without a head, whose outputs are hidden states."""
    return name_of_class.endswith(BODY) and name_of_class != GPT2


def outputs_of(name_of_class: str, pooled: bool) -> tuple[str, ...]:
    """Return the names of the graph's outputs, as Optimum and sentence-transformers name them."""
    if name_of_class.endswith("ForQuestionAnswering"):
        return ("start_logits", "end_logits")
    if is_body(name_of_class):
        return ("last_hidden_state", "sentence_embedding") if pooled else ("last_hidden_state",)
    return ("logits",)


def check_labels(checkpoint: Checkpoint, factors: Mapping[str, Factors], name_of_class: str) -> None:
    """Raise UnsupportedError for a question-answering head without exactly two outputs, start and end."""
    if not name_of_class.endswith("ForQuestionAnswering"):
        return
    heads = {str(checkpoint.folder): {name: ref.shape for name, ref in checkpoint.tensors.items()}}
    heads |= {
        str(value.source): {key: head.shape for key, head in value.replacements.items()} for value in factors.values()
    }
    problems = [
        Problem(
            f"{source}: its question-answering head has {shapes['qa_outputs.weight'][0]} outputs per token",
            "2: start and end",
        )
        for source, shapes in heads.items()
        if "qa_outputs.weight" in shapes and shapes["qa_outputs.weight"][0] != 2
    ]
    raise_all(problems, UnsupportedError)


def label_count(name_of_class: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of labels of the head in `shapes`; None for a model without labels."""
    for end, names in TASKS.items():
        if name_of_class.endswith(end):
            for name in names:
                if name in shapes:
                    return int(shapes[name][0])
    return None
