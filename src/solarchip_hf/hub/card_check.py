"""Checks a card without the network: what the Hub's own check of the metadata would refuse, and a few mistakes more."""

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

# Tasks of the Hub (huggingface.js, tasks/src/pipelines.ts) that anything of this package has.
PIPELINE_TAGS = ("image-feature-extraction", "image-classification", "image-to-image")
LIBRARIES = ("transformers", "diffusers", "solarchip_hf", "datasets")

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+_-]*")
_REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+")
_LISTS = ("tags", "datasets", "metrics", "widget", "model-index", "task_categories", "size_categories", "configs")


def card_problems(content: str) -> list[str]:
    """What is wrong with a card's metadata.

    Args:
        content: The whole README.md.

    Returns:
        A sentence a problem; empty where all is well.
    """
    match = REGEX_YAML_BLOCK.search(content)
    if not match:
        return ["metadata: expected a block between two lines of ---, got none."]
    try:
        data = yaml.safe_load(match[2])
    except yaml.YAMLError as error:
        return [f"metadata: expected YAML: {error}."]
    if not isinstance(data, Mapping):
        return [f"metadata: expected names with values, got {type(data).__name__}."]
    problems = [f"{name}: expected a list, got {data[name]!r}." for name in _LISTS if not _is_list(data.get(name, []))]
    if problems:
        return problems
    problems += _one_of(data, "pipeline_tag", PIPELINE_TAGS) + _one_of(data, "library_name", LIBRARIES)
    if "license" in data and not (isinstance(data["license"], str) and _IDENTIFIER.fullmatch(data["license"])):
        problems.append(f"license: expected an identifier as 'apache-2.0', got {data['license']!r}.")
    for name in ("tags", "metrics"):
        for value in data.get(name, []):
            if not isinstance(value, str) or not value.strip():
                problems.append(f"{name}: expected words, got {value!r}.")
    for value in [*data.get("datasets", []), *_as_list(data.get("base_model"))]:
        if not isinstance(value, str) or not _REPOSITORY.fullmatch(value):
            problems.append(f"datasets, base_model: expected repositories as 'owner/name', got {value!r}.")
    for entry in data.get("widget", []):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("src"), str):
            problems.append(f"widget: expected entries with src, got {entry!r}.")
    for model in data.get("model-index", []):
        problems += _model_index(model)
    return problems


def check_card(content: str) -> None:
    """Refuses a card with wrong metadata.

    Raises:
        ValueError: With every problem.
    """
    problems = card_problems(content)
    if problems:
        raise ValueError("card: " + " ".join(problems))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _one_of(data: Mapping[str, Any], name: str, known: tuple[str, ...]) -> list[str]:
    if name not in data or data[name] in known:
        return []
    return [f"{name}: expected one of {', '.join(known)}, got {data[name]!r}."]


def _model_index(model: Any) -> list[str]:
    if not isinstance(model, Mapping) or not isinstance(model.get("name"), str) or not _is_list(model.get("results")):
        return [f"model-index: expected a name and results, got {model!r}."]
    problems = []
    for index, result in enumerate(model["results"]):
        place = f"model-index.results[{index}]"
        task, dataset = result.get("task") or {}, result.get("dataset") or {}
        if not isinstance(task.get("type"), str):
            problems.append(f"{place}.task.type: expected a task, got {task.get('type')!r}.")
        for name in ("type", "name"):
            if not isinstance(dataset.get(name), str) or not dataset[name]:
                problems.append(f"{place}.dataset.{name}: expected words, got {dataset.get(name)!r}.")
        metrics = result.get("metrics")
        if not _is_list(metrics) or not metrics:
            problems.append(f"{place}.metrics: expected at least one, got {metrics!r}.")
            continue
        for metric in metrics:
            value = metric.get("value")
            if not isinstance(metric.get("type"), str):
                problems.append(f"{place}.metrics: expected a type, got {metric!r}.")
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                problems.append(f"{place}.metrics: expected a finite value of {metric.get('type')}, got {value!r}.")
    return problems


__all__ = ["LIBRARIES", "PIPELINE_TAGS", "card_problems", "check_card"]
