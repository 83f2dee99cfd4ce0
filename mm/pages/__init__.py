"""Reports as pages: one HTML file each, with everything in it and nothing fetched.

Entry points: run_page.run_page of a run's files, samples_page.samples_page of samples. Pages read results;
they work out none.
"""
