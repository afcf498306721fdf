"""Make the built-in sample: raw files in the Amazon 2014 format, with known interests behind them.

    python data/make_sample.py            # about 3,000 users and 1,500 items into data/raw, the same ones every time

Writes to --out (default: raw/ beside this file), each file complete or not at all:
    reviews_sample_5.json.gz   JSON lines reviewerID, asin, overall, unixReviewTime (whole days), reviewTime; sorted by asin, as the
                               public files are, so that users appear first in the order of their smallest asin
    meta_sample.json.gz        Python-literal lines asin, title, price, brand, categories
    sample_truth.json          what the generator knew: `users` id -> leaf categories, `items` id -> leaf category. Tests
                               compare with it; no stage reads it.

How a history comes about. Every user has a persona (a set of leaf categories that go together) and 2 to 4 interests,
most of them from the persona, whose weights drift from the first event to the last. An event stays with the
interest of the one before with probability .35. Inside an interest the next item is a successor of the user's last one there
with probability .2 and otherwise drawn by popularity, which is skewed; one event in five is noise from all items.
About a third of the events share the day of the one before. As in real files, 1 % of titles are missing, HTML
entities occur, some lines are broken (0.3 %) or double, some users and items are too rare to be kept, and the
metadata describes items that nobody reviewed.
"""
import argparse
import gzip
import json
import os
import time
from pathlib import Path

import numpy as np

FIRST_DAY, LAST_DAY = 15_000, 16_200  # days since 1970-01-01: January 2011 to May 2014
BROKEN, NO_TITLE, DOUBLE = 0.003, 0.01, 0.0005
STAY, SUCCESSOR, NOISE, SAME_DAY = 0.35, 0.2, 0.2, 0.35
PERSONAS = 60

# department > aisle > leaf: product types | attributes of the aisle's products | brands of the aisle
TAXONOMY = """
Kitchen > Coffee & Tea > Espresso Machines: Espresso Machine, Semi-Automatic Espresso Maker, Capsule Coffee Machine | Stainless Steel, 15-Bar, Compact | Brevona, Caffelito, Morrow
Kitchen > Coffee & Tea > Coffee Beans: Whole Bean Coffee, Ground Coffee, Espresso Roast Beans | Dark Roast, Organic, Decaf | Brevona, Highland Cup, Morrow
Kitchen > Coffee & Tea > Loose Tea: Green Tea, Earl Grey Loose Leaf Tea, Oolong Tea | Organic, Hand-Picked, Fair Trade | Lotus Path, Highland Cup, Teasmith
Kitchen > Cookware > Frying Pans: Frying Pan, Skillet, Saute Pan | Cast Iron, Nonstick, Copper Core | Ironwell, Chefora, Pangrove
Kitchen > Cookware > Stock Pots: Stock Pot, Dutch Oven, Soup Pot with Lid | Enameled, Stainless Steel, Nonstick | Ironwell, Chefora, Pangrove
Kitchen > Baking > Cake Pans: Springform Cake Pan, Bundt Pan, Muffin Tin | Nonstick, Silicone, Heavy-Gauge | Floury, Bakewright, Chefora
Kitchen > Baking > Decorating Tools: Icing Piping Tips, Fondant Cutters, Cake Turntable | Reusable, Professional, Silicone | Floury, Bakewright, Sugarbell
Kitchen > Knives > Chef Knives: Chef's Knife, Santoku Knife, Bread Knife | Forged, High-Carbon, Damascus | Edgeline, Kurohama, Chefora
Beauty > Skin Care > Face Moisturizers: Face Cream, Daily Moisturizer, Night Cream | Hydrating, Anti-Aging, Fragrance-Free | Dermelle, Aurelie, Purevale
Beauty > Skin Care > Sunscreen: Sunscreen Lotion, Face Sunscreen, Sun Stick | SPF 50, Mineral, Water-Resistant | Dermelle, Solguard, Purevale
Beauty > Skin Care > Facial Cleansers: Foaming Face Wash, Cleansing Oil, Exfoliating Scrub | Gentle, Charcoal, Fragrance-Free | Dermelle, Aurelie, Purevale
Beauty > Makeup > Nail Polish: Nail Lacquer, Gel Nail Polish, Nail Top Coat | Glossy, Matte, Glitter | Lacqui, Rougette, Polishe
Beauty > Makeup > Lipstick: Lipstick, Liquid Lip Color, Lip Gloss | Matte, Long-Wear, Moisturizing | Rougette, Vivanne, Lacqui
Beauty > Makeup > Eye Makeup: Mascara, Eyeshadow Palette, Liquid Eyeliner | Waterproof, Volumizing, Smoky | Rougette, Vivanne, Opaline
Beauty > Hair Care > Shampoo: Shampoo, Dandruff Shampoo, Dry Shampoo | Sulfate-Free, Volumizing, Argan Oil | Silkroot, Manea, Purevale
Beauty > Hair Care > Hair Styling: Hair Gel, Curling Iron, Hair Spray | Strong Hold, Ceramic, Frizz Control | Silkroot, Manea, Curlique
Office > Writing > Fountain Pens: Fountain Pen, Fountain Pen Ink Bottle, Ink Converter | Fine Nib, Medium Nib, Refillable | Scribner & Vale, Inkwood, Penfold
Office > Writing > Gel Pens: Gel Pens, Rollerball Pens, Retractable Gel Ink Pens | Assorted Colors, Black Ink, Fine Point | Penfold, Glidex, Inkwood
Office > Writing > Markers: Permanent Markers, Dry Erase Markers, Highlighters | Chisel Tip, Assorted Colors, Low-Odor | Glidex, Markit, Brightline
Office > Paper > Notebooks: Spiral Notebook, Hardcover Journal, Dot Grid Notebook | College Ruled, Recycled, Pocket Size | Leafbound, Penfold, Papelmar
Office > Paper > Printer Paper: Copy Paper, Photo Paper, Cardstock | Bright White, Glossy, Acid-Free | Papelmar, Printora, Leafbound
Office > Filing > Binders: Ring Binder, Report Cover, Binder Dividers | Heavy-Duty, 3-Inch, Clear View | Fileright, Ordna, Papelmar
Office > Filing > Labels: Address Labels, Label Maker Tape, Name Badge Labels | Self-Adhesive, Laminated, Removable | Fileright, Printora, Ordna
Office > Machines > Cordless Phones: Cordless Phone, Corded Desk Phone, Conference Speakerphone | DECT 6.0, Expandable, Caller ID | Telvox, Printora, Ringwell
Office > Machines > Printers: Laser Printer, Inkjet All-in-One Printer, Toner Cartridge | Wireless, Monochrome, High-Yield | Printora, Tonerix, Officio
Garden > Growing > Vegetable Seeds: Heirloom Tomato Seeds, Pepper Seeds, Lettuce Seeds | Non-GMO, Organic, Open-Pollinated | Greenbriar, Sowell, Rootwise
Garden > Growing > Flower Bulbs: Tulip Bulbs, Daffodil Bulbs, Dahlia Tubers | Perennial, Mixed Colors, Early Bloom | Sowell, Florabel, Greenbriar
Garden > Growing > Potting Soil: Potting Mix, Compost, Plant Fertilizer | Organic, Slow-Release, Moisture Control | Rootwise, Greenbriar, Terrafirm
Garden > Tools > Pruning Shears: Bypass Pruners, Hedge Shears, Tree Lopper | Titanium, Ergonomic, Heavy-Duty | Trimwell, Edgeline, Gardenhand
Garden > Tools > Watering: Garden Hose, Watering Can, Drip Irrigation Kit | Expandable, Brass, Adjustable | Rainfold, Gardenhand, Aquaspry
Garden > Outdoor > Bird Feeders: Bird Feeder, Hummingbird Feeder, Wild Bird Seed | Squirrel-Proof, Hanging, Window-Mount | Featherfold, Perchwood, Gardenhand
Garden > Outdoor > Grills: Charcoal Grill, Grill Brush, Wood Smoking Chips | Portable, Cast Iron, Hickory | Emberly, Ironwell, Smokestead
Pets > Dogs > Dog Food: Dry Dog Food, Canned Dog Food, Puppy Food | Grain-Free, Chicken Recipe, Small Breed | Barkwell, Houndly, Tailwag
Pets > Dogs > Dog Toys: Dog Chew Toy, Squeaky Dog Toy, Rope Tug Toy | Durable, Plush, Natural Rubber | Tailwag, Houndly, Fetchit
Pets > Dogs > Leashes & Collars: Dog Leash, Dog Harness, Dog Collar | Reflective, Retractable, Leather | Fetchit, Houndly, Barkwell
Pets > Cats > Cat Litter: Clumping Cat Litter, Litter Box, Litter Scoop | Unscented, Dust-Free, Covered | Purrfold, Felina, Cleanpaw
Pets > Cats > Cat Toys: Catnip Mice, Cat Scratching Post, Feather Wand Cat Toy | Interactive, Sisal, Plush | Purrfold, Felina, Whiskerby
Pets > Fish > Aquariums: Glass Aquarium Kit, Aquarium Filter, LED Aquarium Light | 20-Gallon, Quiet, Submersible | Reefline, Aquaspry, Finhaven
Sports > Running > Running Shoes: Running Shoes, Trail Running Shoes, Track Spikes | Lightweight, Cushioned, Breathable | Stridex, Fleetly, Marathy
Sports > Running > Fitness Trackers: GPS Running Watch, Heart Rate Monitor, Pedometer | Waterproof, Bluetooth, Rechargeable | Pulsera, Fleetly, Stridex
Sports > Yoga > Yoga Mats: Yoga Mat, Yoga Block, Yoga Strap | Extra Thick, Non-Slip, Cork | Asanya, Zenfold, Lotus Path
Sports > Camping > Tents: Camping Tent, Backpacking Tent, Rain Tarp | 4-Person, Ultralight, Waterproof | Northridge, Campward, Trailsend
Sports > Camping > Sleeping Bags: Sleeping Bag, Sleeping Pad, Camping Hammock | Down, Compact, Cold-Weather | Northridge, Campward, Trailsend
Sports > Camping > Headlamps: LED Headlamp, Camping Lantern, Tactical Flashlight | Rechargeable, Waterproof, 500-Lumen | Lumenar, Campward, Trailsend
Sports > Cycling > Bike Lights: Bicycle Headlight, Bike Tail Light, Bike Bell | USB Rechargeable, Ultra Bright, Waterproof | Lumenar, Veloria, Spokeway
Sports > Cycling > Bike Repair: Bicycle Tire Pump, Inner Tube, Bike Multi-Tool | Portable, Puncture-Resistant, Stainless Steel | Veloria, Spokeway, Gearmont
Toys > Building > Building Bricks: Building Bricks Set, Spaceship Building Kit, Castle Construction Set | 500-Piece, Classic, Glow-in-the-Dark | Brickaboo, Stacko, Playforge
Toys > Building > Model Trains: Model Train Set, Wooden Railway Track, Train Station Kit | HO Scale, Electric, Wooden | Railmont, Playforge, Stacko
Toys > Games > Board Games: Strategy Board Game, Family Board Game, Cooperative Board Game | 2-Player, Award-Winning, Deluxe Edition | Tablemoot, Gamesmith, Quillon
Toys > Games > Jigsaw Puzzles: 1000-Piece Jigsaw Puzzle, Wooden Puzzle, Panorama Puzzle | Landscape, Animals, Fine Art | Puzzella, Gamesmith, Quillon
Toys > Games > Card Games: Playing Cards, Trading Card Booster Pack, Party Card Game | Waterproof, Expansion, Travel | Tablemoot, Gamesmith, Quillon
Toys > Babies > Baby Rattles: Baby Rattle, Teething Ring, Stacking Cups | Wooden, BPA-Free, Soft | Tinytoes, Cuddlewick, Playforge
Music > Guitars > Guitar Strings: Acoustic Guitar Strings, Electric Guitar Strings, Bass Strings | Light Gauge, Phosphor Bronze, Coated | Fretwell, Tonewood, Stringer & Co
Music > Guitars > Effects Pedals: Distortion Pedal, Delay Pedal, Reverb Guitar Pedal | True Bypass, Analog, Mini | Fretwell, Voltane, Wavemark
Music > Recording > Microphones: Condenser Microphone, USB Microphone, Microphone Stand | Cardioid, Studio, Adjustable | Wavemark, Soniclair, Voltane
Music > Recording > Headphones: Studio Headphones, In-Ear Monitors, Headphone Amplifier | Closed-Back, Noise-Isolating, Wireless | Soniclair, Wavemark, Auraphon
Music > Keyboards > Digital Pianos: Digital Piano, MIDI Keyboard Controller, Piano Bench | 88-Key, Weighted, Portable | Claviere, Tonewood, Voltane
Health > Vitamins > Multivitamins: Multivitamin Tablets, Vitamin C Gummies, Vitamin D3 Softgels | Sugar-Free, High-Potency, Vegan | Vitalux, Purevale, Nutrova
Health > Vitamins > Protein Powder: Whey Protein Powder, Plant Protein Powder, Protein Bars | Chocolate, Vanilla, Unflavored | Nutrova, Musclar, Vitalux
Health > First Aid > Bandages: Adhesive Bandages, Gauze Pads, Athletic Tape | Sterile, Flexible Fabric, Waterproof | Mendwell, Carefirst, Solguard
"""
COLORS = ("Black", "White", "Red", "Navy Blue", "Forest Green", "Silver", "Purple", "Teal")
SIZES = ("Small", "Medium", "Large", "Pack of 2", "Pack of 6", "Value Size", "Travel Size", "Set of 4")


def parse_taxonomy():
    """[(path of names, product types, attributes, brands)], one entry per leaf."""
    leaves = []
    for line in TAXONOMY.strip().splitlines():
        path, rest = line.split(": ", 1)
        leaves.append((path.split(" > "), *(part.split(", ") for part in rest.split(" | "))))
    return leaves


def make_ids(rng, n, prefix, length):
    """`n` distinct ids in random order: `prefix` and then random capitals and digits, `length` in all, as Amazon's look."""
    letters = np.array(list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    ids = {}
    while len(ids) < n:
        ids[prefix + "".join(rng.choice(letters, length - len(prefix)))] = None
    return list(ids)


def make_items(rng, n, leaves):
    """(leaf of each item, int64 (n,); titles). Leaves differ in size; titles are distinct."""
    share = rng.dirichlet(np.full(len(leaves), 6.0))
    leaf = np.sort(np.concatenate([np.arange(len(leaves)), rng.choice(len(leaves), n - len(leaves), p=share)]))
    titles = []
    taken = set()
    for j in leaf:
        _, types, attributes, brands = leaves[j]
        model = 0
        while True:
            title = f"{rng.choice(brands)} {rng.choice(attributes)} {rng.choice(types)}"
            ending = [f"{rng.choice(COLORS)}", f"{rng.choice(SIZES)}",
                      f"{rng.choice(SIZES)}, {rng.choice(COLORS)}"][rng.integers(3)]
            title += f", {ending}" if model < 20 else f" {rng.integers(100, 1000)}, {ending}"
            if title not in taken:
                break
            model += 1
        taken.add(title)
        titles.append(title)
    return leaf, titles


def make_histories(rng, n_users, leaf, n_leaves):
    """For every user (interests as leaf numbers, item indices in order)."""
    members = [np.flatnonzero(leaf == j) for j in range(n_leaves)]
    draw = []  # popularity inside each leaf
    for items in members:
        weight = (rng.permutation(len(items)) + 3.0) ** -0.6
        draw.append(weight / weight.sum())
    leaf_weight = (rng.permutation(n_leaves) + 8.0) ** -0.6
    leaf_weight /= leaf_weight.sum()
    noise = np.concatenate([w * leaf_weight[j] for j, w in enumerate(draw)])  # items are sorted by leaf
    noise /= noise.sum()
    successors = np.stack([rng.choice(members[j], 3) for j in leaf])
    personas = [rng.choice(n_leaves, 5, replace=False, p=leaf_weight) for _ in range(PERSONAS)]
    persona_weight = (np.arange(PERSONAS) + 4.0) ** -0.6
    persona_weight /= persona_weight.sum()

    histories = []
    for _ in range(n_users):
        persona = personas[rng.choice(PERSONAS, p=persona_weight)]
        k = rng.choice([2, 3, 4], p=[0.2, 0.4, 0.4])
        interests = list(rng.permutation(persona)[:k])
        if rng.random() < 0.5:
            interests[-1] = rng.choice(np.setdiff1d(np.arange(n_leaves), interests))
        start, end = rng.dirichlet(np.full(k, 1.5), 2)
        length = 5 + rng.geometric(0.2) - 1 if rng.random() < 0.97 else rng.integers(1, 5)
        history, last, current = [], {}, None
        while len(history) < length:
            t = len(history) / length
            if rng.random() < NOISE:
                item = rng.choice(len(leaf), p=noise)
            else:
                if current is None or rng.random() >= STAY:
                    current = interests[rng.choice(k, p=(1 - t) * start + t * end)]
                if current in last and rng.random() < SUCCESSOR:
                    item = rng.choice(successors[last[current]])
                else:
                    item = rng.choice(members[current], p=draw[current])
                last[current] = item
            if item not in history:
                history.append(int(item))
        histories.append((sorted(int(j) for j in interests), history))
    return histories


def review_lines(rng, histories, user_ids, item_ids):
    """JSON lines sorted by asin, then day; some broken, some double."""
    events = []
    for user, (_, history) in enumerate(histories):
        step = np.where(rng.random(len(history)) < SAME_DAY, 0, rng.geometric(0.06, len(history)))
        days = rng.integers(FIRST_DAY, LAST_DAY - 200) + np.cumsum(step)
        events += [(item_ids[item], int(day), user_ids[user]) for item, day in zip(history, np.minimum(days, LAST_DAY))]
    events.sort()
    lines = []
    for item, day, user in events:
        line = json.dumps({"reviewerID": user, "asin": item, "overall": float(rng.choice([3, 4, 5], p=[0.1, 0.3, 0.6])),
                           "unixReviewTime": day * 86400, "reviewTime": time.strftime("%m %d, %Y", time.gmtime(day * 86400))})
        lines += [line] * (1 + int(rng.random() < DOUBLE))
    return with_broken(rng, lines)


def with_broken(rng, lines):
    """The lines, a few of them cut off in the middle as an interrupted copy leaves them."""
    return [line[:rng.integers(5, len(line) - 1)] if rng.random() < BROKEN else line for line in lines]


def metadata_lines(rng, item_ids, leaf, titles, leaves):
    """Python-literal lines, as the public 2014 metadata has them."""
    lines = []
    for key, j, title in zip(item_ids, leaf, titles):
        path = leaves[j][0]
        row = {"asin": key}
        if rng.random() >= NO_TITLE:
            row["title"] = title.replace("&", "&amp;")
        row["price"] = round(float(rng.lognormal(2.7, 0.8)), 2)
        if rng.random() < 0.9:
            row["brand"] = next(brand for brand in leaves[j][3] if title.startswith(brand))
        row["categories"] = [path] if rng.random() < 0.9 else [path[:1], path]
        lines.append(repr(row))
    return with_broken(rng, [lines[i] for i in np.argsort(item_ids)])


def write(path, text):
    """Write `text` (gzipped for a .gz name, with no time stamp, so that equal text gives equal bytes) and rename."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    data = text.encode()
    temporary.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
    os.replace(temporary, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "raw", help="folder to write to")
    parser.add_argument("--users", type=int, default=3200, help="users before filtering (3200)")
    parser.add_argument("--items", type=int, default=1700, help="items before filtering (1700)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (0)")
    args = parser.parse_args(argv)
    leaves = parse_taxonomy()
    if args.items < 3 * len(leaves) or args.users < 20:
        parser.error(f"expected at least 20 users and {3 * len(leaves)} items, found {args.users} and {args.items}")
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    unseen = args.items // 20  # described in the metadata, in nobody's history
    item_ids, user_ids = make_ids(rng, args.items + unseen, "B00", 10), make_ids(rng, args.users, "A", 14)
    leaf, titles = make_items(rng, args.items + unseen, leaves)
    seen = np.sort(rng.permutation(args.items + unseen)[:args.items])
    histories = make_histories(rng, args.users, leaf[seen], len(leaves))
    histories = [(interests, [int(seen[i]) for i in history]) for interests, history in histories]
    reviews = review_lines(rng, histories, user_ids, item_ids)
    metadata = metadata_lines(rng, item_ids, leaf, titles, leaves)
    names = [" > ".join(path) for path, *_ in leaves]
    truth = {"users": {key: [names[j] for j in interests] for key, (interests, _) in zip(user_ids, histories)},
             "items": {key: names[j] for key, j in zip(item_ids, leaf)}}
    write(args.out / "sample_truth.json", json.dumps(truth, indent=0) + "\n")
    write(args.out / "meta_sample.json.gz", "\n".join(metadata) + "\n")
    write(args.out / "reviews_sample_5.json.gz", "\n".join(reviews) + "\n")
    print(f"{args.out}: {len(reviews):,} reviews by {args.users:,} users, {len(metadata):,} items in {len(leaves)} leaf categories")


if __name__ == "__main__":
    main()
