"""Engines: what runs behind ``scores``.

Each maps pixels to raw outputs and says in ``facts`` what it is. `auto` is OpenVINO on
a CPU and torch elsewhere. A converted or compiled network is compared with torch on the
first images it sees; where it differs, or cannot be made, torch runs instead, and that
is said and recorded.
"""
