"""`megalith doctor`: what this machine has, what is wrong with it, and what to do about each."""

from __future__ import annotations

from collections import Counter

from cyclopts import App

from megalith.cli.output import JsonFlag, print_json, result_console, working

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}

app = App(
    name="doctor",
    help_format="plaintext",
    help_epilogue="""\
Examples:
  megalith doctor
  megalith doctor --json""",
)


@app.default
def doctor(*, json: JsonFlag = False) -> int:
    """Say what this machine has and what is wrong.

    Each line is ok, warn (works, but something is lost) or bad (something
    cannot work), with the remedy. The exit code is 1 when something is bad.
    """
    from megalith.cli import doctor_checks as checks

    groups = (
        checks.python, checks.processor, checks.memory, checks.memory_limit, checks.disk, checks.compiler,
        checks.native, checks.simulator, checks.torch, checks.dependencies, checks.models, checks.profile,
        checks.network,
    )  # fmt: skip
    with working("looking"):
        findings = [finding for group in groups for finding in group()]
    counts = Counter[str](finding.state for finding in findings)
    if json:
        print_json({"findings": findings, "counts": {state: counts[state] for state in _STYLES}, "nature": "measured"})
        return int(counts["bad"] > 0)
    console = result_console()
    for finding in findings:
        console.print(
            f"[{_STYLES[finding.state]}]{finding.state:<4}[/] [bold]{finding.name:<13}[/]", end=" ", soft_wrap=True
        )
        console.print(finding.what, markup=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"{'':<19}-> {finding.remedy}", markup=False, soft_wrap=True, style="dim")
    console.print(f"\n{counts['ok']} ok, {counts['warn']} to improve, {counts['bad']} bad")
    return int(counts["bad"] > 0)
