"""The paper's published results (arXiv 2411.09410, Tables 1-4 and the preference study), for side-by-side tables.

Recall@20, Recall@50, HR@20, HR@50 and, where given, the set-order NDCG@20 and NDCG@50, on the file-order split. Data
sets are recognised by their statistics, not by their folder's name.
"""
STATISTICS = {"Beauty": (22363, 12101, 198502), "Grocery": (14681, 8713, 151254), "Office": (4905, 2420, 53258)}
COLUMNS = ("recall@20", "recall@50", "hr@20", "hr@50", "ndcg_published@20", "ndcg_published@50")
PUBLISHED = {
    "Beauty": {
        "pop": (.0452, .0660, .0675, .0966), "dnn": (.1613, .2361, .2401, .3299), "gru4rec": (.1388, .2109, .2141, .2982),
        "sasrec": (.1495, .2220, .2320, .3129), "bert4rec": (.1430, .2050, .2221, .2986),
        "llm2bert4rec": (.1383, .2053, .2181, .2919), "mind": (.1563, .2384, .2203, .3272),
        "comirec-sa": (.1582, .2594, .2325, .3545), "remi": (.2189, .3420, .3111, .4532, .1139, .1304),
        "remi-eimf": (.2323, .3636, .3268, .4802, .1204, .1348)},
    "Grocery": {
        "pop": (.0729, .1305, .1252, .2137), "dnn": (.1252, .2044, .2076, .3227), "gru4rec": (.1387, .2300, .2321, .3649),
        "sasrec": (.1536, .2508, .2586, .3750), "bert4rec": (.1544, .2372, .2614, .3608),
        "llm2bert4rec": (.1259, .2080, .2164, .3294), "mind": (.1445, .2162, .2328, .3322),
        "comirec-sa": (.1122, .2076, .1851, .3220), "remi": (.1617, .2574, .2539, .3832, .0953, .1108),
        "remi-eimf": (.1758, .2704, .2750, .3955, .1025, .1181)},
    "Office": {
        "gru4rec": (.0800, .1770, .1384, .2811), "sasrec": (.1152, .1963, .1792, .2871),
        "bert4rec": (.1037, .1920, .1812, .3116), "mind": (.0915, .1593, .1466, .2505),
        "comirec-sa": (.0788, .1589, .1202, .2321), "remi": (.1072, .2018, .1751, .2973, .0637, .0825),
        "llm2bert4rec": (.1085, .2117, .1812, .3360), "remi-eimf": (.1222, .2296, .1772, .3503, .0649, .0930)},
}


# EIMF on other backbones: Recall@50, HR@50.
TAUGHT = {
    "Beauty": {"bert4rec-eimf": (.2155, .3071), "sasrec-eimf": (.2499, .3469), "mind-eimf": (.2518, .3424)},
    "Office": {"bert4rec-eimf": (.2101, .3380), "sasrec-eimf": (.2088, .3198), "mind-eimf": (.2023, .2953)},
}
# The preference study's best Recall@50, and the preference it was reached with.
BEST_PREFERENCE = {"Beauty": (-10, .3636), "Grocery": (-5, .2856), "Office": (-2, .2492)}


def published(stats):
    """Name and published rows of the data set with these `stats.json` counts: (name, {model: {metric: value}}).

    (None, {}) for a data set that the paper does not have.
    """
    counts = tuple(stats[key] for key in ("users", "items", "interactions"))
    for name, expected in STATISTICS.items():
        if counts == expected:
            rows = {model: dict(zip(COLUMNS, row)) for model, row in PUBLISHED[name].items()}
            return name, rows | {model: dict(zip(("recall@50", "hr@50"), row)) for model, row in TAUGHT.get(name, {}).items()}
    return None, {}
