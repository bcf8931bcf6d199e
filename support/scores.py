"""From the records of questions to the scores of tasks, and to the table that eval.py prints."""
import math
import statistics


def summarize(records: list[dict]) -> dict[str, dict]:
    """{metric: value, standard error, n} of a task's records, in per cent except bits per byte.
    The metrics of a record are its entries of type float."""
    if "bits" in records[0]:
        bits = [record["bits"] for record in records]
        num_bytes = [record["bytes"] for record in records]
        return {"bits per byte": ratio_of_sums(bits, num_bytes)}
    scores = {}
    for metric, value in records[0].items():
        if isinstance(value, float):
            values = [100 * record[metric] for record in records]
            scores[metric] = ratio_of_sums(values, [1] * len(values))
    return scores


def ratio_of_sums(values: list[float], sizes: list[float]) -> dict:
    """sum(values) / sum(sizes) with its standard error

        std(values[i] - ratio * sizes[i]) / sqrt(n) / mean(sizes)

    With sizes of 1 these are the mean and std(values) / sqrt(n).

    >>> ratio_of_sums([1, 0, 1, 1], [1, 1, 1, 1])
    {'value': 0.75, 'stderr': 0.25, 'n': 4}
    """
    n = len(values)
    ratio = sum(values) / sum(sizes)
    stderr = math.nan
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
    """A row for each metric, with a column of scores and standard errors for each model. The last
    column is what the report states of Motif-2-12.7B, with the number of examples in brackets."""
    header = f"{'task':21s} {'shots':>5s} {'metric':13s} {'n':>6s}"
    for name in results:
        header += f"{name:>17s}"
    lines = [header + f"{'reported':>12s}"]

    for task, metric, scores in scores_by_metric(results):
        last = scores[-1]
        line = f"{task:21s} {last['shots']:5d} {metric:13s} {last['n']:6,d}"
        for score in scores:
            line += f"{score['value']:9.3f} ±{score['stderr']:6.3f}"
        reported = "-"
        if last["reported"] is not None:
            reported = f"{last['reported']:.2f} ({last['report_shots']})"
        lines.append(line + f"{reported:>12s}")
    return "\n".join(lines)
