"""Class names as generated answers: what could never be right, or never be told apart, shows before a run."""

from __future__ import annotations

from digrap_scale.config import Config
from digrap_scale.config.schema import GenerationConfig
from digrap_scale.data.classes import load_classes
from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.vqa_accuracy import normalise_answer
from digrap_scale.models.build import family_of, read_config, resolve_folder


def class_answer_problems(config: Config) -> list[str]:
    """Of ``classification-as-vqa`` with ``class_answers: generate`` and something to measure, a line each: names with more
    tokens than may be generated, and names that are one and the same (or nothing) once answers are normalised."""
    measured = config.evaluation.suite or config.data.hold_out is not None
    generates = config.model.task == "classification-as-vqa" and config.evaluation.class_answers == "generate"
    if not (measured and generates) or config.data.classes is None:
        return []
    try:
        names = load_classes(config.data.classes).names
        folder = resolve_folder(config.model, weights=False)
        family = family_of(folder, read_config(folder, config.model, None), config.model)
    except ConfigError:
        return []  # told by the checks of the classes and of the model
    problems = []
    longest = (config.evaluation.generation or GenerationConfig()).max_new_tokens
    asked = config.data.prompt.replace("{question}", config.data.class_question)
    for name in names:
        # The last token is the answer's end: whether it is reached makes no difference to the text.
        tokens = len(family.continuation(asked, 1, name)["input_ids"]) - 1
        if tokens > longest:
            problems.append(
                f"evaluation.generation.max_new_tokens: the class {name!r} has {tokens} tokens, found {longest}, so no generated "
                f"answer could be right; set it to {tokens} or more, or evaluation.class_answers: likelihood"
            )
    read: dict[str, str] = {}
    for name in names:
        form = normalise_answer(name)
        if not form:
            problems.append(
                f"data.classes: {name!r} is nothing once answers are normalised (articles, punctuation); rename it, or set "
                "evaluation.class_answers: likelihood"
            )
        elif form in read:
            problems.append(
                f"data.classes: {read[form]!r} and {name!r} are both {form!r} once answers are normalised, so either counts "
                "as the other; rename one, or set evaluation.class_answers: likelihood"
            )
        read.setdefault(form, name)
    return problems
