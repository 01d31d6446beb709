"""The report of `make load`: a page of Markdown and a figure."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from serve.contract.markdown import markdown_table


def as_markdown(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    machine = results["machine"]
    return "\n".join(
        [
            "# Load, faults and bad input",
            "",
            f"Written by `make load` on {machine['num_cpus']} cores of {machine['processor']}, "
            "which the clients share with the service. The model is the tests' toy, a single "
            "convolution, so the service is the limit, and the correct labels are known. Each "
            "client checks the labels of its own image, which has a size of its own.",
            "",
            _table_of_loads(results),
            "",
            *_what_was_seen(results),
            "",
            "![Memory under steady load; answers per second while Triton is killed](load.png)",
            "",
            *_bad_input(results["malformed"]),
            "",
        ]
    )


def _table_of_loads(results: dict[str, Any]) -> str:
    loads = {"steady": results["steady"], "overload": results["overload"]}
    loads |= {"Triton killed": results["triton_killed"]}
    loads |= {f"worker killed, of {one['num_workers']}": one for one in results["worker_killed"]}
    rows = [
        [
            name,
            one["num_clients"],
            f"{one['seconds']:g}",
            _counts(one["outcomes"]),
            f"{one['answers_per_second']:,g}",
            *(f"{one[f'latency_{share}_ms']:g} ms" for share in ("p50", "p95", "p99")),
        ]
        for name, one in loads.items()
    ]
    headers = "load", "clients", "seconds", "outcomes", "right answers/s", "p50", "p95", "p99"
    return markdown_table(headers, rows, align="lrrlrrrr")


def _what_was_seen(results: dict[str, Any]) -> list[str]:
    steady, overload, triton = (results[n] for n in ("steady", "overload", "triton_killed"))
    memory = steady["memory"]
    of_two, alone = results["worker_killed"]
    down_s = triton["events_s"]["starting"] - triton["events_s"]["killed"]
    return [
        f"- **Steady** (2 workers, up to {steady['settings']['max_waiting']} requests each): "
        f"memory {memory['mebibytes'][0]:g} MiB at the start, {memory['mebibytes'][-1]:g} MiB at "
        f"the end, {memory['growth_in_second_half']:+.1%} over the second half.",
        f"- **Overload** (1 worker, at most {overload['settings']['max_waiting']} waiting "
        "requests): the service answers further requests with 429 and `Retry-After`. At most "
        f"{overload['most_in_progress']} requests were in progress at a time.",
        f"- **Triton killed** (SIGKILL) and restarted {down_s:.1f} s later: while it was down, "
        f"the answers were {', '.join(triton['outcomes_while_down'])}. The first correct answer "
        f"came {triton['right_again_after_s']:g} s after Triton was ready. The service was "
        f"{'not ' if triton['service_not_started_again'] else ''}restarted. "
        f"`/readyz`: {_codes(triton)}.",
        "- **Worker killed** (SIGKILL). With two workers, the other kept answering, and BentoML "
        f"replaced the killed one after {of_two['worker_replaced_after_s']:g} s (it checks every "
        "10 s). With one worker, new connections waited, and the first answer came "
        f"{alone['right_again_after_s']:g} s later. The killed worker's own requests are lost: "
        f"their connections break. `/readyz` with two workers: {_codes(of_two)}; with one: "
        f"{_codes(alone)}.",
    ]


def _bad_input(bad: dict[str, Any]) -> list[str]:
    statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
    slowest: defaultdict[str, float] = defaultdict(float)
    for kind, one in bad["kinds"].items():
        name = kind.split()[0] if kind.startswith(("truncated", "bit-flipped")) else kind
        statuses[name].update(one["statuses"])
        slowest[name] = max(slowest[name], one["slowest_ms"])
    return [
        f"## {bad['count']:,} malformed uploads",
        "",
        f"{bad['not_refused']} got an answer other than a 4xx with a JSON error. All "
        f"{bad['right_answers_between']} good requests in between got correct answers from "
        f"{'the same process' if bad['same_worker_at_the_end'] else 'ANOTHER PROCESS'}. Median "
        f"{bad['median_ms']:g} ms, slowest {bad['slowest_ms']:g} ms.",
        "",
        markdown_table(
            ("upload", "statuses", "slowest"),
            [
                (name, _counts(counts), f"{slowest[name]:g} ms")
                for name, counts in sorted(statuses.items())
            ],
            align="llr",
        ),
        "",
        "Truncated and bit-flipped files count only if Pillow cannot read them. Files that it "
        f"still reads are damaged images. Their answers: {_counts(bad['damaged_but_readable'])}.",
    ]


def _counts(outcomes: dict[str, int]) -> str:
    return ", ".join(f"{count:,} x {outcome}" for outcome, count in sorted(outcomes.items()))


def _codes(fault: dict[str, Any]) -> str:
    return ", then ".join(code for _, code in fault["readyz"])


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw memory under steady load, and answers per second while Triton is killed."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    steady = results["steady"]
    memory = steady["memory"]
    left.plot(memory["at_s"], memory["mebibytes"], color="#0072b2")
    left.set(xlabel="seconds", ylabel="MiB", ylim=(0, 1.15 * max(memory["mebibytes"])))
    left.set_title(
        f"memory of the service, {results['steady']['num_clients']} clients", fontsize="medium"
    )
    triton = results["triton_killed"]
    seconds = range(len(triton["outcomes_per_second"]))
    for outcome, color in (("200", "#009e73"), ("503", "#d55e00")):
        counts = [one.get(outcome, 0) for one in triton["outcomes_per_second"]]
        right.step(seconds, counts, where="post", color=color, label=outcome)
    down = triton["events_s"]
    right.axvspan(down["killed"], down["started"], color="0.9", label="Triton is down")
    right.set(xlabel="seconds", ylabel="answers per second", ylim=(0, None))
    right.set_title("Triton killed and restarted", fontsize="medium")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
