"""The report: a page that says what a sweep asked, what it found, and how sure that is.

The way of the data: results, in memory or read back from a folder -> `page.PageData` -> words,
tables and figures, each a frozen dataclass -> the templates, which escape all they are given.
"""
