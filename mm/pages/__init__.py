"""Reports as pages: one HTML file each, with everything in it and nothing fetched.

Entry points: run_page.write_report, samples_page.samples_page, frame.document, frame.write_page. Pages read
results; they work out none.
"""
