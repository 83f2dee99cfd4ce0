"""Layouts: how the samples that people have are written, and our segments or messages made of them.

Entry points: layout.Layout, find.find_layout, find.layout_name, tar.made_of. A layout is a pure
function of a record (what a json, a line or a row has) and of the names of the payloads that come with it.
"""
