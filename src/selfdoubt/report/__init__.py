"""Reports: what risk scores are worth, measured on judged answers, as JSON, PNG and a page.

``html`` holds the page.
"""
