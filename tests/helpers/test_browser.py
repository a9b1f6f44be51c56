"""The browser that pages are tested in sees what a page does wrong."""


def test_browser_reports_a_page_that_makes_requests_and_fails(browser, tmp_path):
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        "<title>t</title><button onclick=\"this.textContent='on'\">off</button>"
        "<img src='http://127.0.0.1:9/x.png'><script>console.error('said'); nothing.there()</script>"
    )
    page = browser.open(wrong)
    assert page.requests == ["http://127.0.0.1:9/x.png"]
    assert "said" in page.errors and any("nothing is not defined" in error for error in page.errors)
    assert page.evaluate("document.title") == "t" and page.texts("button") == ["off"]
    page.click("button")
    page.wait("document.querySelector('button').textContent === 'on'")


def test_a_page_that_is_well_is_seen_to_be(browser, tmp_path):
    well = tmp_path / "well.html"
    well.write_text("<link rel=icon href='data:,'><p>here</p>")
    page = browser.open(well)
    assert page.texts("p") == ["here"] and not page.errors and not page.requests
    page.screenshot(tmp_path / "well.png")
    assert (tmp_path / "well.png").read_bytes().startswith(b"\x89PNG")


def test_waiting_looks_again_where_a_page_forbids_eval(browser, tmp_path):
    late = tmp_path / "late.html"
    policy = "default-src 'none'; script-src 'unsafe-inline'"
    late.write_text(
        f"<meta http-equiv='Content-Security-Policy' content=\"{policy}\"><title>t</title>"
        "<script>setTimeout(() => { document.title = 'late'; }, 300)</script>"
    )
    page = browser.open(late)
    page.wait("document.title === 'late'")
    assert not page.errors
