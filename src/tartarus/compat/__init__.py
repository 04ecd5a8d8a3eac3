"""Other container engines (Kampe): running through them where one must, and leaving them.

`tartarus migrate` and `tartarus legacy` call it. An engine is reached over its own local socket only, everything that
comes from it is foreign and bounded, and what runs there is held by that engine and never by us.
"""
