"""The data converters: `python -m train prepare NAME` and the reports derive from `CONVERTERS`.

A new converter is a file in this folder and one entry here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from train.data.convert.annotations import AnnotationSettings, prepare_annotations
from train.data.convert.bcss import BcssSettings, prepare_bcss
from train.data.convert.bdsa import BdsaSettings, prepare_bdsa
from train.data.convert.crag import CragSettings, prepare_crag
from train.data.convert.glas import GlasSettings, prepare_glas
from train.data.convert.ocelot import OcelotSettings, prepare_ocelot
from train.data.synthetic.dataset import SyntheticSettings, write_dataset
from train.data.synthetic.slides import SlideSettings, write_slides


@dataclass(frozen=True, kw_only=True)
class Converter:
    """One source of data sets in SAM-Path's layout."""

    name: str
    """What the command line and a data set's settings.json call it."""
    help: str
    """One line for the command line."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Paths that it reads, in order: the argument's name and its help text."""
    settings: type[Any]
    """A frozen dataclass with a default for each field; its fields become options."""
    convert: Callable[..., None]
    """Called as `convert(*inputs, out, settings)`; it writes the folder `out` whole or not at all,
    and raises `FocalPathError` where it cannot."""


CONVERTERS: dict[str, Converter] = {
    converter.name: converter
    for converter in (
        Converter(
            name="synthetic",
            help="Draw H&E tissue, unless it is there already.",
            settings=SyntheticSettings,
            convert=write_dataset,
        ),
        Converter(
            name="synthetic-slides",
            help="Draw large H&E images at 0.25 um per pixel, for work across magnifications.",
            settings=SlideSettings,
            convert=write_slides,
        ),
        Converter(
            name="bcss",
            help="Cut BCSS (breast cancer): 22 codes in the masks, grouped to five classes.",
            inputs={"source": "The folder with rgbs_colorNormalized/ (or images/) and masks/."},
            settings=BcssSettings,
            convert=prepare_bcss,
        ),
        Converter(
            name="crag",
            help="Convert CRAG (colorectal glands): instance masks, two classes.",
            inputs={
                "source": "The folder with train/ and valid/, each with Images/ and Annotation/."
            },
            settings=CragSettings,
            convert=prepare_crag,
        ),
        Converter(
            name="bdsa",
            help="Draw the masks of BDSA (brain) from Digital Slide Archive annotations, five "
            "classes. Tiles of 1024 pixels at 0.25 um per pixel, as for BCSS, are our choice.",
            inputs={
                "source": "The folder with images/, annotations/ and, optionally, regions.csv."
            },
            settings=BdsaSettings,
            convert=prepare_bdsa,
        ),
        Converter(
            name="ocelot",
            help="Take OCELOT's tissue patches and masks (six organs): cancer area or not.",
            inputs={"source": "The folder with metadata.json, images/ and annotations/."},
            settings=OcelotSettings,
            convert=prepare_ocelot,
        ),
        Converter(
            name="glas",
            help="Take GlaS (colon glands): gland or not, or benign and malignant glands.",
            inputs={"source": "The folder with train_1.bmp, train_1_anno.bmp, Grade.csv."},
            settings=GlasSettings,
            convert=prepare_glas,
        ),
        Converter(
            name="annotations",
            help="Cut annotated slides or images: QuPath GeoJSON, ASAP or ImageScope XML, Digital "
            "Slide Archive JSON. The first call writes a template of what the labels mean.",
            inputs={
                "source": "The folder of slides or images.",
                "annotations": "The folder of annotations, named as the slides.",
            },
            settings=AnnotationSettings,
            convert=prepare_annotations,
        ),
    )
}
