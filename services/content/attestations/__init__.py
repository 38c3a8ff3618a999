"""What is said of an image beside it, and by whom: signatures, bills of material, provenance.

    keys          keys that sign, keys that are trusted; PEM and cosign's own form
    envelopes     in-toto statements, signed (DSSE) and packed as Sigstore bundles. Pure.
    attachments   kept as OCI referrers of an image: written, listed, read
    verification  which trusted key signed an image; the one place that decides whether it counts
    keyless       signatures by identity, through Sigstore; needs the extra `keyless`

Everything here is bound to a manifest's digest, so nothing of it can be carried over to another image, and nothing
that is read is believed before a trusted key has signed it: types and annotations of a store only say where to look.
"""
