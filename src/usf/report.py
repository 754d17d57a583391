"""The page that ``usf inspect`` writes: one HTML file with everything in it, and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from usf.calibration import CalibrationError, agreement
from usf.deploy import Scored
from usf.files import atomic_write
from usf.inspection import Result
from usf.plots import calibration as calibration_figures
from usf.plots import inspection as figures
from usf.plots.heatmaps import overlay, to_image
from usf.plots.theme import theme
from usf.study.images import load_images

__all__ = ["body", "page", "write"]

SHOWN = 8
"""Images in each row of the gallery."""
PICTURE = 200
"""Their largest side, pixels."""
NAMED = 12
"""Names that are listed before the rest is a number."""
LISTED = 500
"""Rows of the table of all test images."""
NARROW = 3.6
"""Width of a chart for narrow windows, inches."""

STYLE = """
.usf{--ink:#1d2733;--soft:#53606e;--head:#3c4855;--page:#fff;--card:#f2f5f8;--line:#dde3ea;--note:#eef5fb;
 --warn:#fdf1e7;--alarm:#b0568a;--lit:1;
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;color:var(--ink);
 background:var(--page);max-width:1080px;margin:0 auto;padding:1rem 1.5rem 4rem;box-sizing:border-box}
@media(prefers-color-scheme:dark){.usf{--ink:#e3e8ee;--soft:#a6b1bd;--head:#c3ccd6;--page:#121212;--card:#1f252c;
 --line:#333c46;--note:#13283a;--warn:#38230f;--alarm:#CC79A7;--lit:1.25}}
.usf h1{font-size:1.9rem;line-height:1.2;margin:.6rem 0 .2rem;overflow-wrap:anywhere}
.usf h2{font-size:1.25rem;margin:2.4rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--line)}
.usf h3{font-size:1rem;margin:1.4rem 0 .4rem}
.usf p,.usf li{overflow-wrap:anywhere}.usf .text,.usf .note,.usf .warn{max-width:46rem}
.usf .sub{color:var(--soft);margin:0 0 1.2rem}.usf .tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}
.usf .tile{flex:1 1 6.5rem;background:var(--card);border-radius:8px;padding:.7rem .9rem}
.usf .tile b{display:block;font-size:1.45rem;line-height:1.2}.usf .tile span{color:var(--soft);font-size:.86rem}
.usf .note{background:var(--note);border-left:4px solid #0072B2;padding:.6rem .9rem;margin:.8rem 0}
.usf .warn{background:var(--warn);border-left:4px solid #D55E00;padding:.6rem .9rem;margin:.8rem 0}
.usf .wide{overflow-x:auto}.usf table{border-collapse:collapse;font-size:.93rem}
.usf td,.usf th{padding:.25rem 1.1rem .25rem 0;text-align:left;vertical-align:top}
.usf th{font-weight:600;color:var(--head)}.usf td.r,.usf th.r{text-align:right;font-variant-numeric:tabular-nums}
.usf .all{max-height:24rem;overflow:auto;border:1px solid var(--line);border-radius:8px;padding:0 .9rem .5rem}
.usf .all thead th{position:sticky;top:0;background:var(--page);padding-top:.5rem}
.usf .all tr.alarm td{color:var(--alarm)}
.usf .gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(225px,1fr));gap:1rem}
.usf figure{margin:0}.usf .gallery figure{background:var(--card);border-radius:8px;padding:.5rem;
 border:2px solid transparent}
.usf .gallery figure.alarm{border-color:#CC79A7}.usf .pair{display:flex;gap:3px}.usf .pair img{width:calc(50% - 1.5px);
 border-radius:4px;display:block}
.usf figcaption{font-size:.8rem;color:var(--head);overflow-wrap:anywhere;margin-top:.35rem;line-height:1.35}
.usf .chart{filter:brightness(var(--lit));max-width:100%;height:auto;display:block;margin:.6rem 0}
.usf pre{background:var(--card);border-radius:8px;padding:.8rem 1rem;overflow:auto;font-size:.87rem;line-height:1.45}
.usf code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
.usf details{margin:.6rem 0}.usf summary{cursor:pointer;color:var(--head)}
.usf .bar{display:inline-block;width:180px;max-width:50%;height:10px;border-radius:3px;
 background:linear-gradient(90deg,VALUES);vertical-align:middle;margin:0 .4rem}
@media(max-width:600px){.usf{padding:1rem 1rem 3rem}}
@media print{.usf .all{max-height:none}.usf figure,.usf tr{break-inside:avoid}}
"""
PAGE = "body{margin:0;background:#fff}@media(prefers-color-scheme:dark){body{background:#121212}}"


def _text(value: object) -> str:
    # File names may hold what is no text; a page must.
    return escape(str(value).encode("utf8", "backslashreplace").decode("utf8")).replace(" %", "\N{NO-BREAK SPACE}%")


def _data(image: Image.Image, side: int = PICTURE) -> str:
    shown = image.convert("RGB")
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=84, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _png(figure: Figure) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=True)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _chart(draw: Callable[[float], Figure], width: float, alt: str) -> str:
    """A chart drawn twice, for windows of either kind; transparent, in colours that do on light and dark pages.

    Args:
        draw: width in inches -> figure.
        width: in wide windows, inches.
        alt: in words.
    """
    wide, narrow = _png(draw(width)), _png(draw(min(width, NARROW)))
    return (
        f'<picture><source media="(max-width:600px)" srcset="{narrow}">'
        f'<img class="chart" width="{round(100 * width)}" alt="{_text(alt)}" src="{wide}"></picture>'
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows)
    return f'<div class="wide"><table>{lines}</table></div>'


def _names(names: Sequence[str]) -> str:
    shown = "; ".join(map(_text, names[:NAMED]))
    return shown + (f"; and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _listing(counts: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{what} ({count})" for what, count in counts[:6])
    return shown + (f", and {len(counts) - 6} more" if len(counts) > 6 else "")


def _found(result: Result) -> str:
    found = result.survey
    rows = [("layout", found.layout), ("normal images", str(len(found.normals)))]
    if found.test:
        kinds: dict[str, int] = {}
        for part in found.test:
            kinds[part.label or "not labelled"] = kinds.get(part.label or "not labelled", 0) + 1
        rows.append(("test images", f"{len(found.test)}: " + ", ".join(f"{n} {k}" for k, n in kinds.items())))
    rows += [("sizes, pixels", _listing(found.sizes)), ("pixels", _listing(found.modes))]
    if found.turned:
        rows.append(("turned upright", f"{found.turned}, as their EXIF says"))
    parts = [_table(rows)]
    if len(found.sizes) > 1:
        shapes = {round(p.size[0] / p.size[1], 2) for p in found.parts}
        if len(shapes) > 1:
            parts.append(
                '<p class="warn">The images do not all have the same shape. Each is resized to a square, so that parts '
                "look stretched differently: crop them alike.</p>"
            )
    if found.unreadable:
        lines = "".join(f"<li><code>{_text(name)}</code>: {_text(why)}</li>" for name, why in found.unreadable[:50])
        more = f"<li>and {len(found.unreadable) - 50} more</li>" if len(found.unreadable) > 50 else ""
        what = _count(len(found.unreadable), "unreadable file")
        parts.append(f'<div class="warn">{what}, left out:<ul>{lines}{more}</ul></div>')
    if found.duplicates:
        lines = "".join(f"<li><code>{' = '.join(map(_text, group))}</code></li>" for group in found.duplicates[:20])
        more = f"<li>and {len(found.duplicates) - 20} more</li>" if len(found.duplicates) > 20 else ""
        parts.append(
            f'<div class="note">{_count(len(found.duplicates), "image")} more than once, byte by byte. Of normal '
            f"images one copy is used: two would make the threshold too sure of itself.<ul>{lines}{more}</ul></div>"
        )
    if found.leaked:
        parts.append(
            f'<p class="warn">{_count(len(found.leaked), "test image")} also among the normal ones to train on, so '
            f"that it proves nothing: {_names(found.leaked)}.</p>"
        )
    if found.unused:
        parts.append(
            f'<p class="warn">{_count(len(found.unused), "image")} in folders that the layout has no use for, neither '
            f"trained on nor tried out: {_names(found.unused)}.</p>"
        )
    if found.ignored:
        parts.append(f"<p>Not images by their names, and left alone: {_names(found.ignored)}.</p>")
    return "".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _groups(result: Result) -> dict[str, tuple[list[float], str]]:
    label = {part.path: part.label for part in result.survey.test}
    read = [item for item in result.scored if not item.error]
    return {
        "normal images, not trained on": ([item.score for item in result.calibration], "usf"),
        "test images, normal": ([item.score for item in read if label[item.path] == "good"], "normal"),
        "test images, anomalous": (
            [item.score for item in read if label[item.path] not in ("good", None)],
            "anomaly",
        ),
        "test images, not labelled": ([item.score for item in read if label[item.path] is None], "gin"),
    }


def _figure(item: Scored, result: Result, names: dict[Path, str]) -> str:
    picture = load_images([item.path], result.options.size)[0]
    heat = overlay(picture, item.map, result.deployed.threshold)
    name = names[item.path]
    said = "alarm" if item.alarm else "no alarm"
    return (
        f'<figure class="{"alarm" if item.alarm else ""}"><div class="pair"><img alt="{_text(name)}" '
        f'src="{_data(to_image(picture))}"><img alt="heatmap of {_text(name)}" src="{_data(heat)}"></div>'
        f"<figcaption>{_text(name)}<br>score {item.score:.4g}, p {item.p:.2g}, <b>{said}</b></figcaption></figure>"
    )


def _row(title: str, items: Sequence[Scored], result: Result, names: dict[Path, str]) -> str:
    if not items:
        return ""
    return f'<h3>{title}</h3><div class="gallery">{"".join(_figure(i, result, names) for i in items)}</div>'


def _gallery(result: Result) -> str:
    names = {part.path: part.name for part in result.survey.parts}
    threshold = result.deployed.threshold

    def nearest(items: Sequence[Scored], skip: Sequence[Scored]) -> list[Scored]:
        taken = {item.path for item in skip}
        rest = [item for item in items if item.path not in taken]
        return sorted(sorted(rest, key=lambda i: abs(np.log(i.score / threshold)))[:SHOWN], key=lambda i: -i.score)

    read = sorted((item for item in result.scored if not item.error), key=lambda item: -item.score)
    held = sorted(result.calibration, key=lambda item: -item.score)
    parts = []
    if read:
        top = read[:SHOWN]
        parts.append(_row("Most anomalous test images", top, result, names))
        parts.append(_row("Test images nearest to the threshold", nearest(read, top), result, names))
    top = held[: SHOWN // 2 if read else SHOWN]
    parts.append(_row("Most anomalous normal images, of those not trained on", top, result, names))
    if not read:
        parts.append(_row("Normal images nearest to the threshold", nearest(held, top), result, names))
    return "".join(parts)


def _percent(value: float) -> str:
    return f"{100 * value:.3g}\N{NO-BREAK SPACE}%"


def _tiles(result: Result) -> str:
    known = result.deployed.calibration
    tiles = [
        (_percent(known.alpha), f"false-alarm rate {'promised' if len(result.plan.folds) == 1 else 'aimed at'}"),
        *(
            [
                (
                    f"\N{LESS-THAN OR EQUAL TO} {100 * result.deployed.guaranteed:.2g}\N{NO-BREAK SPACE}%",
                    "guaranteed rate",
                )
            ]
            if len(result.plan.folds) > 1
            else []
        ),
        (f"{known.threshold:.4g}", "threshold of the score"),
        (str(len(known.normals)), "normal images set it"),
    ]
    read = [item for item in result.scored if not item.error]
    if read:
        tiles.append((f"{sum(item.alarm for item in read)} of {len(read)}", "test images raise an alarm"))
    if "image AUROC" in result.metrics:
        tiles.append((_percent(result.metrics["image AUROC"]), "image AUROC"))
    tiles.append((f"{result.speed.rate:.3g}", "images a second"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
        + "</div>"
    )


def _batch(result: Result) -> str:
    """The test images as one batch: which to call anomalous, at what price."""
    read = sorted((item for item in result.scored if not item.error), key=lambda item: -item.score)
    if not read:
        return ""
    rate, names = result.options.fdr, {part.path: part for part in result.survey.test}
    flags = result.deployed.flagged([item.p for item in read], rate)
    called = [item for item, flag in zip(read, flags, strict=True) if flag]
    alarms = sum(item.alarm for item in read)
    text = (
        f"Judged one by one, {alarms} of {_count(len(read), 'test image')} raise an alarm; of 100 good ones about "
        f"{100 * result.deployed.calibration.alpha:.3g} would. Judged as one batch, at a false-discovery rate of "
        f"{_percent(rate)}, <b>{len(called)} are flagged</b>. "
    )
    if result.survey.labelled and called:
        good = sum(names[item.path].label == "good" for item in called)
        bad = sum(part.label != "good" for part in result.survey.test)
        text += (
            f"By their labels {good} of these {'is' if good == 1 else 'are'} normal, and {len(called) - good} of "
            f"{_count(bad, 'anomalous image')} are among them. "
        )
    rows = "".join(
        f"<tr{' class=alarm' if item.alarm else ''}><td>{_text(names[item.path].name)}</td>"
        + (f"<td>{_text(names[item.path].label)}</td>" if result.survey.labelled else "")
        + f'<td class="r">{item.score:.4g}</td><td class="r">{item.p:.2g}</td>'
        f"<td>{'yes' if item.alarm else ''}</td><td>{'yes' if flag else ''}</td></tr>"
        for item, flag in list(zip(read, flags, strict=True))[:LISTED]
    )
    more = f"<p>and {len(read) - LISTED} more: <code>usf score</code> lists all.</p>" if len(read) > LISTED else ""
    kind = "<th>label</th>" if result.survey.labelled else ""
    return (
        f'<h2>The test images as one batch</h2><p class="text">{text}'
        f"{_text(result.deployed.batch_promise(rate, len(read)))}</p>"
        f"<details><summary>All {_count(len(read), 'test image')}, most anomalous first</summary>"
        f'<div class="all"><table><thead><tr><th>image</th>{kind}<th class="r">score</th><th class="r">p</th>'
        f"<th>alarm by itself</th><th>flagged in the batch</th></tr></thead><tbody>{rows}</tbody></table>{more}</div>"
        "</details>"
    )


def _law(result: Result) -> str:
    """Whether p-values may be taken from the law of the norm, with the plot that decides it."""
    norms = result.norms
    samples, colors = {"chi, all latents": norms.pit()}, {"chi, all latents": "usf"}
    found = agreement(samples["chi, all latents"])
    effective = ""
    try:
        samples["chi, fitted dimension"] = norms.pit_fitted()
        colors["chi, fitted dimension"] = "non-usf"
        effective = f"The norms vary as if an image had {norms.effective:,.0f} independent latents. "
    except CalibrationError:  # norms that are all the same have no fitted law
        pass
    if found.refuted:
        verdict = f"<b>Do not trust such p-values here</b>: the law is refuted (p = {found.p_value:.1g})."
    else:
        verdict = (
            f"<b>The law is not refuted</b> (p = {found.p_value:.2g}), which is no proof: so few images show such "
            f"p-values to be right within {found.high:.2f} at best."
        )
    with theme():
        chart = _chart(
            lambda width: calibration_figures.pit(samples, colors, stacked=width < 5), 7.4,
            "Probability integral transform of norms: histogram, and distribution function with the diagonal.",
        )  # fmt: skip
    return (
        f'<h2>Is the law of the norm to be trusted?</h2><p class="text">{verdict} If the flow maps normal parts to the '
        f"Gaussian that it was trained for, the norm of an image's {norms.dimension:,} latents has a chi law with as "
        "many degrees of freedom, and p-values as small as one likes follow without a part to compare with. The "
        f'threshold above does not use this law.</p>{chart}<p class="text">The plot has the law\'s probability of a '
        f"smaller norm (PIT), for the {_count(found.count, 'normal image')} that a flow was not trained on. If the law "
        "holds, the bars are level and the distribution function lies on the diagonal, within its band: the "
        f"Kolmogorov-Smirnov distance is below {found.margin:.2f} in 95&nbsp;% of cases. Here it is "
        f"{found.distance:.2f}. {effective}The mean squared latent is {norms.square:.2f}, and 1 under the Gaussian: "
        "the law is scaled to the images trained on.</p>"
    )


def body(result: Result) -> str:
    """The report as a fragment of HTML."""
    known, speed, options = result.deployed.calibration, result.speed, result.options
    title = _text(result.survey.root.resolve().name)
    groups = {key: (np.asarray(values), color) for key, (values, color) in _groups(result).items()}
    with theme():
        curve = _chart(
            lambda width: figures.training(result.losses, width=width), 4.6, "Negative log-likelihood over epochs."
        )
        histogram = _chart(
            lambda width: figures.score_histogram(groups, known.threshold, width=width), 8.6,
            "Histograms of scores and the threshold.",
        )  # fmt: skip
    trained = len(result.survey.normals) - (len(result.plan.folds[0]) if len(result.plan.folds) == 1 else 0)
    epochs = [len(own) for own in result.losses]
    size = sum(path.stat().st_size for path in result.model.glob("model.safetensors")) / 1e6
    model = _text(result.model)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="sub">{_text(result.survey.describe())}. Made in {result.seconds:.0f} s by '
        f"usf {_text(result.deployed.settings['made']['versions']['usf'])}.</p>",
        _tiles(result),
    ]
    if not result.weights.pretrained:
        parts.append(
            f'<p class="warn"><b>The backbone has random weights</b> ({_text(result.weights.reason)}): it has never '
            "seen an image, and the detector is much worse than it could be. Pass <code>--weights</code> with a "
            "safetensors file, or run where the weights can be fetched.</p>"
        )
    parts += ["<h2>What was found</h2>", _found(result), "<h2>The threshold and what it promises</h2>"]
    parts += [f'<p class="text">{_text(result.deployed.promise())}</p>']
    parts += [f'<p class="note">{_text(note)}</p>' for note in result.plan.notes]
    parts += [
        '<p class="text">It promises nothing about how many defects are found, and nothing once camera, light or parts '
        "have changed.</p>",
        histogram,
        _batch(result),
    ]
    if result.metrics:
        rows = "".join(
            f'<tr><th>{_text(name)}</th><td class="r">{_percent(value)}</td></tr>'
            for name, value in result.metrics.items()
        )
        note = (
            ""
            if result.survey.masked
            else "<p>Not every anomalous image has a mask that fits: no numbers by pixel.</p>"
        )
        parts += [f"<h2>Test images with known labels</h2><table>{rows}</table>{note}"]
    parts += [
        '<h2>Gallery</h2><p class="text">Left the image, right its heatmap. Colour starts at half the threshold '
        '<span class="bar"></span> and is full at twice; the outline holds what is above it. The score is the largest '
        "value of the map"
        + (" (here: compared flow by flow)" if len(result.plan.folds) > 1 else "")
        + ", p the share of normal parts that would score as high. A frame marks an alarm.</p>",
        _gallery(result),
        _law(result),
        f'<h2>Training</h2><p class="text">{_count(len(epochs), "flow")} on {trained} images'
        f"{' (each without its part of them)' if len(epochs) > 1 else ''}, {epochs[0]} epochs. "
        f"{_text(result.weights.describe())}.</p>",
        curve,
        "<h2>Speed</h2>",
        _table(
            [
                ("one image alone, median", f"{1000 * speed.latency:.0f} ms (95 % within {1000 * speed.slow:.0f} ms)"),
                ("in batches of 8", f"{speed.rate:.3g} images a second"),
                ("measured on", f"{speed.machine}, files read and resized included"),
                ("model", f"{size:.0f} MB, images of {options.size} x {options.size} pixels"),
            ]
        ),
        "<h2>Use the model</h2>",
        f"<pre><code>usf score {model} new_images --out scores.csv --heatmaps maps --fdr {options.fdr:g}</code></pre>",
        "<p>writes one line an image: score, p-value, alarm, and whether the batch flags it. From Python:</p>",
        "<pre><code>from pathlib import Path\nfrom usf import deploy\n\n"
        f"model = deploy.load(Path({_text(repr(str(result.model)))}))\n"
        'for part in deploy.score_files(model, sorted(Path("new_images").glob("*.png"))):\n'
        "    print(part.path.name, part.score, part.p, part.alarm)</code></pre>",
        '<p class="text">The folder holds tensors, JSON and text alone: loading it executes nothing, and a changed '
        "file is refused."
        + (
            f" <code>model.onnx</code> runs in onnxruntime by itself; an alarm is a score above {known.threshold:.9g}."
            if options.onnx
            else ""
        )
        + "</p>",
    ]
    return f'<style>{_style()}</style><div class="usf">{"".join(parts)}</div>'


def _style() -> str:
    import matplotlib as mpl

    colors = [mpl.colors.to_hex(mpl.colormaps["inferno"](0.25 + 0.75 * x)) for x in np.linspace(0, 1, 6)]
    return STYLE.replace("VALUES", ",".join(colors))


def page(result: Result) -> str:
    """The report as an HTML page without references to anything outside of it."""
    title = _text(result.survey.root.resolve().name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{title}: usf report</title><style>{PAGE}</style></head><body>{body(result)}</body></html>\n"
    )


def write(result: Result, path: Path) -> Path:
    """Write the page, atomically, and return its path."""
    return atomic_write(path, page(result))
