"""One file per model family, named LIBRARY_FAMILY.py. Each defines HOST; see tokred.host.

In the source tree this folder stands next to tokred/; installed, it is `tokred.patches`. Nothing
in tokred/ imports these files by name, so that tokred works without their libraries.
"""

if __name__ != "tokred.patches":
    raise ImportError("this folder is imported as tokred.patches; run `pip install -e .` first")
