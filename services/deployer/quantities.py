"""Amounts as Kubernetes writes them. Pure.

Source: kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity.
"""

from decimal import Decimal, InvalidOperation

_UNITS = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Ki": Decimal(1 << 10),
    "Mi": Decimal(1 << 20),
    "Gi": Decimal(1 << 30),
    "Ti": Decimal(1 << 40),
    "Pi": Decimal(1 << 50),
    "Ei": Decimal(1 << 60),
}


def quantity(text: str) -> Decimal:
    """A Kubernetes quantity: `500m`, `2`, `1.5Gi`, `1e3`. Raises ValueError."""
    number, unit = text.strip(), Decimal(1)
    for suffix in sorted(_UNITS, key=len, reverse=True):
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix), _UNITS[suffix]
            break
    try:
        found = Decimal(number) * unit
    except InvalidOperation:
        raise ValueError(f"{text!r} is no quantity as Kubernetes writes them, as 500m or 4Gi") from None
    if not found.is_finite() or found < 0:
        raise ValueError(f"{text!r} is no amount of anything")
    return found
