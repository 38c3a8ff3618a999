"""The bill of material of an image: CycloneDX 1.6, the same bytes for the same image.

It has no time, and its serial number comes from the image's digest: a second build of the same image gives the same
bill, so that attaching it again attaches nothing. Of the base there are its digest and its distribution's packages.
"""

import json
import uuid

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from services.builder.materials import Material, Materials, Package
from services.content.images import canonical

_PROPERTY = "dev.ekiben"


def bill_of(materials: Materials) -> bytes:
    """The bill as JSON."""
    image = _image(materials)
    bento = _bento(materials)
    base = _base(materials.base)
    models = [_model(each) for each in materials.models]
    packages = {each.name: _library(each) for each in materials.packages}
    system = [_system(each) for each in materials.system]
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"oci:{materials.image.digest}"),
        components=[bento, base, *models, *packages.values(), *system],
    )
    bom.metadata.timestamp = None  # type: ignore[assignment]  # left out where it is None
    bom.metadata.component = image
    bom.register_dependency(image, [bento, base])
    bom.register_dependency(base, system)
    # What is installed was resolved for the bento: it needs all of it, and says itself which of it directly.
    needed = {name for each in materials.packages for name in each.requires}
    roots = [component for name, component in packages.items() if name not in needed] or list(packages.values())
    bom.register_dependency(bento, [*models, *roots])
    for each in materials.packages:
        bom.register_dependency(packages[each.name], [packages[name] for name in each.requires])
    return canonical(json.loads(JsonV1Dot6(bom).output_as_string()))


def _image(materials: Materials) -> Component:
    repository, _, version = materials.bento.name.partition(":")
    purl = PackageURL("oci", None, repository.lower(), str(materials.image.digest), {"arch": str(materials.platform)})
    return Component(
        type=ComponentType.CONTAINER,
        name=repository,
        version=version,
        purl=purl,
        bom_ref=f"image:{materials.image.digest}",
        properties=[
            _property("platform", str(materials.platform)),
            _property("python", materials.python),
            _property("bentoml-version", materials.bentoml),
            _property("environment", materials.environment_digest),
            _property("lock", str(materials.lock_digest)),
        ],
    )


def _bento(materials: Materials) -> Component:
    repository, _, version = materials.bento.name.partition(":")
    return Component(
        type=ComponentType.APPLICATION,
        name=repository,
        version=version,
        bom_ref=f"bento:{materials.bento.name}",
        properties=[_property("layer", str(materials.bento.digest))],
    )


def _base(base: Material) -> Component:
    path = base.name.rpartition("://")[2].rpartition("//")[2]
    name = path.rpartition("/")[2].partition("@")[0].partition(":")[0] or "base"
    return Component(
        type=ComponentType.CONTAINER,
        name=base.name or "base",
        version=str(base.digest),
        purl=PackageURL("oci", None, name.lower(), str(base.digest)),
        bom_ref=f"base:{base.digest}",
    )


def _model(model: Material) -> Component:
    repository, _, version = model.name.partition(":")
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=repository,
        version=version,
        bom_ref=f"model:{model.name}",
        properties=[_property("layer", str(model.digest)), _property("layer-size", str(model.size_bytes))],
    )


def _library(package: Package) -> Component:
    purl = PackageURL("pypi", None, package.name, package.version)
    licenses = []
    if package.license:
        licenses = [LicenseExpression(package.license) if package.spdx else DisjunctiveLicense(name=package.license)]
    # Of several files it is not known which one was installed; each alone would be told as the package's hash.
    (single,) = package.hashes if len(package.hashes) == 1 else ("",)
    return Component(
        type=ComponentType.LIBRARY,
        name=package.name,
        version=package.version,
        description=package.summary or None,
        licenses=licenses,
        purl=purl,
        bom_ref=purl.to_string(),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=single)] if single else [],
        properties=[] if single else [_property("lock-hash", f"sha256:{each}") for each in package.hashes],
    )


def _system(purl: str) -> Component:
    package = PackageURL.from_string(purl)
    return Component(type=ComponentType.LIBRARY, name=package.name, version=package.version, purl=package, bom_ref=purl)


def _property(name: str, value: str) -> Property:
    return Property(name=f"{_PROPERTY}:{name}", value=value)
