"""The page of faults and inputs, from a report of the tests."""

from __future__ import annotations

from benchmarks.reliability import parse_report, render_page

REPORT = """<testsuites><testsuite><testcase name="test_a_run_goes_on[SIGTERM]"><properties>
<property name="faults" value="20"/><property name="lost_steps" value="7"/><property name="in_writing" value="3"/>
</properties></testcase>
<testcase name="test_fuzzed_plans"><properties><property name="inputs" value="1000"/>
<property name="accepted" value="30"/><property name="refused" value="970"/></properties><failure/></testcase>
<testcase name="test_that_records_nothing"/><testcase name="test_left_out"><skipped/></testcase>
</testsuite></testsuites>"""


def test_what_tests_record_is_counted_and_shown() -> None:
    cases = list(parse_report(REPORT))
    assert [(one.name, one.outcome) for one in cases] == [
        ("a run goes on (SIGTERM)", "passed"),
        ("fuzzed plans", "failure"),
        ("left out", "skipped"),
    ]
    page = render_page(cases)
    assert "20 faults: 1 of 1 cases passed; 7 steps were done twice" in page
    assert "| a run goes on (SIGTERM) | 20 | 7 | passed |" in page
    assert "| fuzzed plans | 1,000 | 30 | 970 | failure |" in page
