"""The deployer: from a bento to running replicas, and the routes to them.

Terms. A *deployment* is a bento kept running. A *revision* is one template of it, as it was rolled out, and never
changes. A *target* is a version that gets requests: `main`, or a canary by its name. A *replica set* is the replicas of
one service of one target of one revision; a runtime keeps its replicas alive. A *route* says where requests go.

Of several deployers on one database one has the *cluster* and runs its replicas; the others stand by.

Invariants. What is desired is rows in the database; what is observed comes from the runtime; nothing else decides.
A rolling update never has fewer replicas ready than desired, nor more than the surge beyond. A replica is stopped only
once no gateway routes to it. The services behind an entry service unpickle what they are sent, so they listen on Unix
sockets in a folder that only the suite's user may enter.

    domain        names, limits, strategies, manifests of bentos, instance types, states
    rollout       pure: what is desired and observed to the next steps
    status        pure: what is observed to a state and conditions in words
    runtimes/     the port Runtime: process.py (this machine), kubernetes/ (pods), several.py (many as one)
    store         tables and queries
    deployments   use cases; templates: what callers send, checked; filters, ports, acceptance: parts of theirs
    routes        the route table, its version, who follows it
    clusters      clusters that somebody added, and their runtimes; kubeconfigs: what of theirs is kept
    ownership     which deployer has the cluster, where there are several
    reconciler    the loop; desired, observed, attention: what of its input is another
    decisions     pure: what is seen of a deployment to what its replica sets are told
    rolling       tells the runtime; supplies: builds and secrets that replicas need first; revisions: what is rolled
    traffic       the ways to deployments, and replicas that may end; routing: pure, what is seen to a route
    reports       writes what was seen; exposures: what came of them
    terminals     use cases; attachments: while one is open; recordings: what is kept of it
    messages, servicer, app, settings    as in every service
"""
