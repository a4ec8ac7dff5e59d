"""Other packages' ways of calling, over this one: change the import, and leave the rest.

    import tokred.compat.tome as tome  # was: import tome
    import tokred.compat.tomesd as tomesd  # was: import tomesd

Written from what those packages document; none of their code is here. Every difference is listed
in docs/migrating.md.
"""
