"""How results look to people: one set of styles, charts, tables and number formats for all pages.

A page is one HTML file without outside parts: it opens from a folder, in an e-mail, without a network.
"""
