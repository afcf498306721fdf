"""The evaluation's report: Markdown, and one self-contained HTML page with plots."""
import html
import io

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "eimf"  # element ids, and so the files, are the same on every run
import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's colours: distinct in print and in colour-blind vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } figure { margin: 1.5rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
figure svg { width: 100%; height: auto; } figcaption { color: #444; font-size: .9rem; padding: 0 .5rem .5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } caption { text-align: left; color: GrayText; padding: .3rem 0; }
"""


def p_value(p):
    """"p = .012", None is "not testable"."""
    if p is None:
        return "not testable"
    return "p < .0001" if p < .0001 else "p = " + (f"{p:.2f}" if p >= .1 else f"{p:.2g}" if p < .001 else f"{p:.3f}").replace("0.", ".", 1)


def markdown_table(header, rows):
    """A Markdown table; cells are strings."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def html_table(header, rows, caption=""):
    def cells(tag, row):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    head, body = cells("th", header), "".join(cells("td", row) for row in rows)
    return (f'<div class="scroll"><table><caption>{html.escape(caption)}</caption><thead>{head}</thead>'
            f"<tbody>{body}</tbody></table></div>")


def html_page(title, parts):
    """A page from ready-made HTML parts."""
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
            f"<body><h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n")


def figure(fig, caption):
    """A matplotlib figure as an inline SVG with a caption."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(fig)
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg'):]}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _axes(count, height=3.2):
    fig, axes = plt.subplots(1, count, figsize=(10, height), constrained_layout=True)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=.3)
    return fig, np.atleast_1d(axes)


def plot_training(log, best_iteration):
    """Loss terms and validation Recall@50 over iterations, from 06's log."""
    fig, (left, right) = _axes(2)
    steps = [entry["iteration"] for entry in log]
    for colour, name in zip(COLOURS, log[0]["loss"]):
        left.plot(steps, [entry["loss"][name] for entry in log], color=colour, label=name.replace("_", " "))
    left.set(xlabel="iteration", ylabel="loss term, as weighted in the total", yscale="log")
    left.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(.5, 1))
    right.plot(steps, [entry["valid"]["recall@50"] for entry in log], color=COLOURS[0])
    right.axvline(best_iteration, color="#666", linestyle="--", linewidth=1)
    right.set(xlabel="iteration", ylabel="validation Recall@50", ylim=(0, None))
    return figure(fig, f"Training. Left: mean of each loss term between validations. Right: validation Recall@50; the dashed "
                       f"line marks iteration {best_iteration}, whose model was exported.")


def plot_metrics(metrics, published, label):
    """Test Recall and hit rate as bars, beside the paper's where there are any."""
    names = ["recall@20", "recall@50", "hr@20", "hr@50"]
    fig, (axis,) = _axes(1, 3)
    at = np.arange(len(names))
    width = .8 / (1 + len(published))
    for n, (name, row) in enumerate([(label, metrics), *published.items()]):
        bars = axis.bar(at + n * width, [row.get(k, 0) for k in names], width * .92, color=COLOURS[n % len(COLOURS)], label=name)
        axis.bar_label(bars, fmt="%.3f", fontsize=7)
    axis.set_xticks(at + width * len(published) / 2, ["Recall@20", "Recall@50", "HR@20", "HR@50"])
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(.5, 1))
    return figure(fig, "Test metrics" + (" beside the published ones." if published else "."))


def plot_diversity(cosine, entropy, wins):
    """Histograms of pairwise interest cosine and routing entropy, and each interest's share of the top 20."""
    fig, (left, middle, right) = _axes(3)
    left.hist(cosine, bins=np.linspace(-1, 1, 41), color=COLOURS[0])
    left.set(xlabel="cosine between a user's interests", ylabel="pairs of interests")
    middle.hist(entropy, bins=np.linspace(0, 1, 41), color=COLOURS[1])
    middle.set(xlabel="routing entropy (1 = uniform over the history)", ylabel="interests")
    right.bar(np.arange(1, len(wins) + 1), wins, color=COLOURS[2])
    right.set(xlabel="interest", ylabel="share of recommended items it wins", ylim=(0, 1), xticks=np.arange(1, len(wins) + 1))
    return figure(fig, "Interest diversity on test users. A collapsed model shows cosines near 1, routing near uniform, or "
                       "one interest that wins everything.")
