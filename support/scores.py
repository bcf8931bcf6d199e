"""Write and read eval.py's two files, and make scores and the table of the records of questions."""
import json
import os
import statistics
import zlib
from pathlib import Path

from configurator import UserError
from support.log import replace_text
from support.weights import read_json


def resume_scores(out: Path, settings: dict) -> tuple[dict, dict]:
    """Make the folder `out` ready for the scores of a run -> what an earlier run left there that
    counts: records {(task, number): record} and results {task: result}.

    If the weights or the tokenizer have changed since, if results.json cannot be read, or if one of
    the files is missing, nothing counts. Then what there is becomes *.old, so that hours of work
    are not lost by a mistake. A damaged line of samples.jsonl is passed over. Both files are
    written anew with what counts, so that the settings are noted before the first new record is
    appended. UserError if the scores are of a model in another folder, or were made with another
    --chat or --precision."""
    out.mkdir(parents=True, exist_ok=True)
    samples = out / "samples.jsonl"
    result_file = out / "results.json"
    earlier = {}
    if result_file.exists():
        try:
            earlier = read_json(result_file)
        except UserError as e:
            print(e)
    check_same_settings(out, earlier, settings)

    records = {}
    results = {}
    is_usable = isinstance(earlier.get("tasks"), dict) and samples.exists()
    if is_usable and earlier.get("stamp") == settings["stamp"]:
        results = earlier["tasks"]
        records = read_records(samples)
    elif any(file.exists() and file.stat().st_size > 0 for file in (samples, result_file)):
        ending = free_ending(out)
        for file in (samples, result_file):
            if file.exists():
                os.replace(file, f"{file}{ending}")
        print(f"{out}: the earlier scores are of other weights or another tokenizer, or cannot be "
              f"read; all questions are measured anew, and the earlier files are kept as *{ending}")
    save_results(out, settings, records, results)
    return records, results


def read_records(samples: Path) -> dict[tuple, dict]:
    """{(task, number): record} of a samples.jsonl, without damaged lines."""
    records = {}
    for line in samples.read_bytes().splitlines(keepends=True):
        record = read_record(line)
        if record is not None:
            records[record["task"], record["doc"]] = record
    return records


def free_ending(out: Path) -> str:
    """.old, or .old2, .old3, ... if there are earlier files of that name."""
    number = 1
    ending = ".old"
    while list(out.glob(f"*{ending}")):
        number += 1
        ending = f".old{number}"
    return ending


def check_same_settings(out: Path, earlier: dict, settings: dict) -> None:
    """UserError if the earlier scores are of another model, or of other --chat or --precision.
    (Older results.json have the model's path as it was given, often a relative one.)"""
    model = earlier.get("model")
    is_same = earlier.get("stamp") == settings["stamp"]       # its folder may have been moved
    if not is_same and isinstance(model, str) and os.path.abspath(model) != settings["model"]:
        raise UserError(f"{out} has the scores of {model}, not of {settings['model']}; delete it "
                        "or give another --out_dir")
    for key in ("chat", "precision"):
        if earlier.get(key, settings[key]) != settings[key]:
            raise UserError(f"{out} has scores with {key}={earlier[key]}, not {settings[key]}; "
                            f"give --{key}={earlier[key]}, or another --out_dir")


def record_line(record: dict) -> bytes:
    """A line of samples.jsonl: the record, and a checksum of it."""
    checksum = zlib.crc32(json.dumps(record).encode())
    return json.dumps({**record, "checksum": checksum}).encode() + b"\n"


def read_record(line: bytes) -> dict | None:
    """The record of a line; None if the line is not as record_line has made it, as when the process
    was killed while it wrote.

    >>> line = record_line({"task": "mmlu", "doc": 7, "acc": 1.0})
    >>> read_record(line)
    {'task': 'mmlu', 'doc': 7, 'acc': 1.0}
    >>> read_record(line[:-2]) is None
    True
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    record.pop("checksum", None)
    return record if record_line(record) == line else None


def save_results(out: Path, settings: dict, records: dict, results: dict) -> None:
    lines = [record_line(records[key]).decode() for key in sorted(records)]
    replace_text(out / "samples.jsonl", "".join(lines))
    text = json.dumps({**settings, "tasks": results}, indent=1, allow_nan=False)
    replace_text(out / "results.json", text + "\n")


def summarize(records: list[dict]) -> dict[str, dict]:
    """{metric: score} of a task's records. A score has

        value, stderr    with the standard error; in per cent, except bits per byte
        n                how many questions there were
        cut              how many of them were too long for the model (if it is to write a reply,
                         together with that), and lost their beginning or, for bits per byte, were
                         cut into windows

    The metrics of a record are its entries of type float. (The harness pools the standard error of
    MMLU over its subjects; ours is over all questions.)"""
    scores = {}
    if "bits" in records[0]:
        bits = [record["bits"] for record in records]
        num_bytes = [record["bytes"] for record in records]
        scores["bits per byte"] = ratio_of_sums(bits, num_bytes)
    else:
        for metric, value in records[0].items():
            if isinstance(value, float):
                values = [100 * record[metric] for record in records]
                scores[metric] = ratio_of_sums(values, [1] * len(values))

    for score in scores.values():
        score["cut"] = sum(record["cut"] for record in records)
    return scores


def ratio_of_sums(values: list[float], sizes: list[float]) -> dict:
    """sum(values) / sum(sizes) with its standard error

        std(values[i] - ratio * sizes[i]) / sqrt(n) / mean(sizes)

    With sizes of 1 these are the mean and std(values) / sqrt(n). A single value has no standard
    error: None.

    >>> ratio_of_sums([1, 0, 1, 1], [1, 1, 1, 1])
    {'value': 0.75, 'stderr': 0.25, 'n': 4}
    """
    n = len(values)
    ratio = sum(values) / sum(sizes)
    stderr = None
    if n > 1:
        deviations = [value - ratio * size for value, size in zip(values, sizes)]
        stderr = statistics.stdev(deviations) / n**0.5 / statistics.fmean(sizes)
    return {"value": ratio, "stderr": stderr, "n": n}


def scores_by_metric(results: dict[str, dict]) -> list[tuple[str, str, list[dict]]]:
    """Results {model: {task: {metric: score}}} -> (task, metric, the score of each model)."""
    rows = []
    of_any_model = next(iter(results.values()))
    for task, metrics in of_any_model.items():
        for metric in metrics:
            rows.append((task, metric, [of_model[task][metric] for of_model in results.values()]))
    return rows


def format_table(results: dict[str, dict]) -> str:
    """A row for each metric, with a column of scores and standard errors for each model. Columns
    `n` and `cut` (see summarize) are those of the last model. The last column is what the report
    states of Motif-2-12.7B, with the number of examples in brackets."""
    header = f"{'task':21s} {'shots':>5s} {'metric':13s} {'n':>6s} {'cut':>6s}"
    for name in results:
        header += f"{name:>17s}"
    lines = [header + f"{'reported':>12s}"]

    for task, metric, scores in scores_by_metric(results):
        last = scores[-1]
        line = f"{task:21s} {last['shots']:5d} {metric:13s} {last['n']:6,d} {last['cut']:6,d}"
        for score in scores:
            stderr = "-" if score["stderr"] is None else f"{score['stderr']:.3f}"
            line += f"{score['value']:9.3f} ±{stderr:>6s}"
        reported = "-"
        if last["reported"] is not None:
            reported = f"{last['reported']:.2f} ({last['report_shots']})"
        lines.append(line + f"{reported:>12s}")
    return "\n".join(lines)
