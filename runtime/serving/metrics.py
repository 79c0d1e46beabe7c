"""What a server has done, in Prometheus' text format."""

from collections import Counter

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """How many values there were, below each of BUCKETS."""

    def __init__(self):
        self.counts, self.sum, self.count = [0] * len(BUCKETS), 0.0, 0

    def add(self, value: float) -> None:
        self.sum += value
        self.count += 1
        for n, bound in enumerate(BUCKETS):
            self.counts[n] += value <= bound

    def lines(self, name: str, what: str) -> list[str]:
        lines = [f"# HELP {name} {what}", f"# TYPE {name} histogram"]
        for bound, count in zip(BUCKETS, self.counts, strict=True):
            lines.append(f'{name}_bucket{{le="{bound:g}"}} {count}')
        lines.append(f'{name}_bucket{{le="+Inf"}} {self.count}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {self.count}"]


class Metrics:
    """Counts of requests; what engines count is read from them."""

    def __init__(self):
        self.answers: Counter[tuple[str, int]] = Counter()  # (path, status)
        self.gone = 0
        self.first_token, self.duration = Histogram(), Histogram()

    def text(self, models: list) -> str:
        """All of it.

        Args:
            models: the `ServedModel`s.
        """
        lines = ["# HELP minimind_requests_total Answers, by path and status."]
        lines.append("# TYPE minimind_requests_total counter")
        for (path, status), count in sorted(self.answers.items()):
            labels = f'path="{path}",status="{status}"'
            lines.append(f"minimind_requests_total{{{labels}}} {count}")
        lines.append("# HELP minimind_disconnects_total Clients that left before their answer.")
        lines.append("# TYPE minimind_disconnects_total counter")
        lines.append(f"minimind_disconnects_total {self.gone}")
        for name, kind, what in (
            ("requests_running", "gauge", "Requests that hold a slot."),
            ("requests_waiting", "gauge", "Requests that wait for a slot."),
            ("prompt_tokens", "counter", "Tokens of prompts."),
            ("cached_tokens", "counter", "Tokens of prompts that had been read for others."),
            ("generated_tokens", "counter", "Tokens written."),
        ):
            full = f"minimind_{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# HELP {full} {what}", f"# TYPE {full} {kind}"]
            for model in models:
                value = getattr(model.engine, name.removeprefix("requests_"))
                value = value if isinstance(value, int) else len(value)
                lines.append(f'{full}{{model="{escape(model.name)}"}} {value}')
        name = "minimind_first_token_seconds"
        lines += self.first_token.lines(name, "Time to the first token of a stream.")
        lines += self.duration.lines("minimind_request_seconds", "Time to the end of an answer.")
        return "\n".join(lines) + "\n"


def escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
