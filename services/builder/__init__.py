"""The builder: from a bento to what can run.

A *build* is one run from a bento to its output: a resource with a state, a log, a result. Today the output is an
*environment*, a folder with a Python interpreter and everything the bento needs, in which a replica starts.

Terms
    recipe       what a bento asks for: a Python, requirements, options. Pure data, made from the bento's files.
    lock         the recipe resolved: every package with its version and hashes. Made once for equal recipes.
    environment  the lock installed. Its digest is that of lock, Python and platform, so bentos
                 with the same lock share it.
    site         a folder of environments. Builders on one share its builds; builds of another are only shown.

Invariants
    A build that ended never changes again.                                  (domain.Build, store: compare-and-set)
    A build is advanced by the holder of its lease only, and each write carries the lease's token.     (store, worker)
    An environment is made beside its place and renamed into it: whatever is there is whole.           (environments)
    A killed builder leaves garbage, never a half environment; the next start takes its builds up again.
    Values of secrets reach uv's environment and nothing else; the log masks them.                     (uv, logs)

Reading order: domain, requirements, recipe, failures (all pure); store, queue; logs, uv, bento, interpreters, locks,
environments; worker, servicer, messages, app. Images: images (pure), layers, bases, assembler, offline.
Serving them: repositories, shelves, sending, forwarding, access, answering, distribution, pulls.
What is said of them: materials, bills, provenance (pure); attesting, image_signing.
"""
