"""Put all results on one page, and tell what became slower since the last time.

command        the page, and which files it is made of
summaries      results as tables
marked_tables  tables in Markdown pages, held to their files
regressions    what became slower, larger or wrong
gpu_section    what `make gpu` found
page           HTML
"""
