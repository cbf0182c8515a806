"""Prints what was compiled, in a table for each chip, when all is done."""

COLUMNS = ("seconds", "temp MB", "fast MB", "kernels", "regs", "spilled")  # fast: VMEM, SMEM


def pytest_terminal_summary(terminalreporter):
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, lines in report.user_properties:
                if name == "compiled":
                    _table(terminalreporter, lines)


def _table(terminalreporter, lines):
    chip = lines[0]["chip"] if lines else ""
    terminalreporter.write_line("")
    terminalreporter.write_line(f"{chip:46}" + "".join(f"{column:>9}" for column in COLUMNS))
    for line in lines:
        fast_bytes = line.get("fast_bytes")
        fast = f"{fast_bytes / 1e6:9.2f}" if fast_bytes is not None else f"{'-':>9}"
        numbers = f"{line['seconds']:9.1f}{line.get('temp_bytes', 0) / 1e6:9.2f}{fast}"
        numbers += f"{line.get('kernels', 0):9}"
        for name in ("registers", "spilled_bytes"):
            told = line.get(name)
            numbers += f"{'-' if told is None else told:>9}"
        error = line.get("error", "")
        terminalreporter.write_line(f"{line['case']:46}{numbers}{' ' * bool(error)}{error[:80]}")
    seconds = sum(line["seconds"] for line in lines)
    terminalreporter.write_line(f"{chip}: {len(lines)} programs in {seconds:.0f} s")
