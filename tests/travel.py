"""Two problems in the form of DeepPlanning, written by hand: a train with a budget, and a flight; in both languages.

Each has a perfect plan, and `MUTATIONS` changes one so that exactly one check fails. Names and places are invented; the
Chinese problems are the English ones with every name replaced.
"""

import csv
import json

LEG = (
    "route_index,segment_index,origin_city,destination_city,dep_date,dep_station_code,dep_station_name,"
    "arr_station_code,arr_station_name,dep_datetime,arr_datetime,duration,{kind},seat_class,seat_status,price"
)
TRAIN = LEG.format(kind="train_type,train_no")
FLIGHT = LEG.format(kind="airline,flight_no,equip_size,equip_type,manufacturer")
HEADINGS = {
    "trains/trains.csv": TRAIN,
    "flights/flights.csv": FLIGHT,
    "hotels/hotels.csv": "name,address,latitude,longitude,decoration_time,hotel_star,price,score,brand,services",
    "attractions/attractions.csv": (
        "attraction_id,attraction_name,attraction_type,city,address,latitude,longitude,description,rating,"
        "opening_time,closing_time,closing_dates,min_visit_hours,max_visit_hours,ticket_price"
    ),
    "restaurants/restaurants.csv": (
        "restaurant_id,restaurant_name,latitude,longitude,query_latitude,query_longitude,price_per_person,cuisine,"
        "opening_time,closing_time,nearby_attraction_name,rating,tags"
    ),
    "locations/locations_coords.csv": "poi_name,latitude,longitude,poi_type",
    "transportation/distance_matrix.csv": "origin,destination,distance_meters,duration_minutes,cost",
}


def leg(route, segment, cities, times, number, price, stations, seats="", kind=("Express",), seat="Second Class Seat"):
    """A row of a train or a flight; "Aville > Beeton", "12 09:00 > 11:00" (day and hours), "A South > B North"."""
    (origin, destination), (start, end) = cities.split(" > "), stations.split(" > ")
    day, left, _, reached = times.split(" ")
    date = f"2025-11-{day}"
    clock = [f"{date} {left}:00", f"{date} {reached}:00"]
    row = [route, segment, origin, destination, date, "S1", start, "S2", end, *clock, 120, kind[0], number, *kind[1:]]
    return [*row, seat, seats, price]


def flight(route, cities, times, number, price):
    stations = " > ".join(f"{city} Airport" for city in cities.split(" > "))
    return leg(
        route, 1, cities, times, number, price, stations, "", ("Cloud Air", "M", "320", "Airbus"), "Economy Class"
    )


def attraction(id, name, kind, latitude, hours, closed, visit, price):
    opens, _, closes = hours.partition("-")
    least, most = visit.split("-")
    where = ["Town", f"{id} Street", latitude, f"12{latitude[1:]}", f"About {name}, in short."]
    return [id, name, kind, *where, "4.5", opens, closes or opens, closed, least, most, price]


def restaurant(id, name, latitude, near, at, price, hours, tags=""):
    opens, _, closes = hours.partition("-")
    places = [latitude, f"12{latitude[1:]}", at, f"12{at[1:]}"]
    return [id, name, *places, price, "Local", opens, closes, near, "4.1", tags]


EXPRESS, BACK = "Aville South > Beeton North", "Beeton North > Aville South"
TABLES = {
    "0": {
        "trains/trains.csv": [
            leg(1, 1, "Aville > Beeton", "12 09:00 > 11:00", "G12", "100.0", EXPRESS),
            leg(2, 1, "Aville > Beeton", "12 09:00 > 11:00", "G14", "100.0", EXPRESS, "2"),
            leg(10, 2, "Aville > Beeton", "12 13:00 > 15:00", "K2", "60.0", "Midway > Beeton North", "9"),
            leg(10, 1, "Aville > Beeton", "12 08:00 > 12:00", "K1", "60.0", "Aville South > Midway", "9"),
            leg(8, 1, "Beeton > Aville", "14 17:00 > 19:00", "G21", "110.0", BACK),
            leg(9, 1, "Beeton > Ceeport", "14 17:00 > 19:00", "G31", "110", "Beeton North > Ceeport Central"),
        ],
        "hotels/hotels.csv": [
            ["Park Inn", "1 Park Lane", "30.100001", "120.1", "2020", "3", "300.0", "4.5", "Park", "Pool;Gym"],
            ["Lake Hotel", "2 Lake Lane", "30.200001", "120.2", "2021", "3", "299.6", "4.6", "Lake", ""],
            ["Grand", "3 Main Street", "30.300001", "120.3", "2022", "5", "900.0", "4.9", "Grand", "Pool"],
        ],
        "attractions/attractions.csv": [
            attraction("A1", "Old Mill", "City Landmark", "30.11", "08:00-18:00", "", "1.0-2.0", "40.0"),
            attraction("A2", "River Park", "Natural Scenery", "30.12", "Open 24 Hours", "", "3.0-5.0", "0.0"),
            attraction("A3", "City Museum", "City Landmark", "30.13", "09:00-17:00", "Monday", "1.5-3.0", "55.0"),
            attraction("A4", "Botanic Garden", "Natural Scenery", "30.14", "08:00-20:00", "", "4.0-6.0", "20.0"),
            attraction("A5", "Night Market", "Leisure", "30.15", "18:00-23:00", "", "1.0-5.0", "0.0"),
            attraction("A6", "Glass House", "Art", "30.16", "09:00-18:00", "Thursday,Sunday", "3.0-5.0", "0.0"),
        ],
        "restaurants/restaurants.csv": [
            restaurant("R1", "Miller's Table", "30.21", "Old Mill", "30.11", "80.0", "10:00-22:00", "Room;Queue"),
            restaurant("R2", "River Kitchen", "30.22", "River Park", "30.12", "60.0", "10:00-22:00"),
            restaurant("R3", "Harbour Grill", "30.23", "River Park", "30.12", "120.0", "16:00-23:00", "Outdoors"),
            restaurant("R4", "Corner Noodles", "30.24", "City Museum", "30.13", "30.0", "06:00-21:00"),
            restaurant("R5", "Garden Cafe", "30.25", "Botanic Garden", "30.14", "50.0", "09:00-20:00"),
            restaurant("R6", "Late Lantern", "30.26", "Night Market", "30.15", "70.0", "17:00-02:00"),
        ],
        "locations/locations_coords.csv": [
            ["Beeton North", "30.01", "120.01", "station"],
            ["Old Mill", "30.11", "120.11", "attraction"],
            ["Miller's Table", "30.21", "120.21", "restaurant"],
            ["Park Inn", "30.100001", "120.1", "hotel"],
            ["River Park", "30.12", "120.12", "attraction"],
            ["City Museum", "30.13", "120.13", "attraction"],
        ],
        "transportation/distance_matrix.csv": [
            ["30.01,120.01", "30.11,120.11", "9000", "20", "20"],
            ["30.11,120.11", "30.21,120.21", "700", "8", "0"],
            ["30.21,120.21", "30.100001,120.1", "5000", "15", "12"],
            ["30.100001,120.1", "30.12,120.12", "8000", "25", "18"],
            ["30.100001,120.1", "30.13,120.13", "6000", "15", "15"],
            ["30.13,120.13", "30.01,120.01", "12000", "32", "30"],
        ],
    },
    "4": {
        "trains/trains.csv": [],
        "flights/flights.csv": [
            flight(1, "Aville > Deeside", "15 07:30 > 09:30", "CA101", "500"),
            flight(2, "Aville > Deeside", "15 07:30 > 09:30", "CA103", "500"),
            flight(3, "Deeside > Aville", "16 14:00 > 16:00", "CA202", "450.4"),
        ],
        "hotels/hotels.csv": [
            ["Sea Hotel", "1 Shore", "31.1", "121.1", "2024", "4", "400", "4.7", "Sea", "Parking"],
            ["Dune Lodge", "2 Shore", "31.2", "121.2", "2019", "3", "400", "4.0", "Dune", ""],
        ],
        "attractions/attractions.csv": [
            attraction("B1", "Lighthouse", "City Landmark", "31.11", "10:00-17:30", "", "1-3", "35.5"),
            attraction("B2", "Long Beach", "Natural Scenery", "31.12", "10:00-24:00", "", "1-4", "35.5"),
        ],
        "restaurants/restaurants.csv": [
            restaurant("S1", "Fish House", "31.21", "Lighthouse", "31.11", "88", "11:00-14:00"),
            restaurant("S2", "Dune Diner", "31.22", "Lighthouse", "31.11", "65", "11:00-24:00", "Queue"),
            restaurant("S3", "Gull's Nest", "31.23", "Long Beach", "31.12", "88", ""),
        ],
        "locations/locations_coords.csv": [
            ["Deeside Airport", "31.01", "121.01", "airport"],
            ["Lighthouse", "31.11", "121.11", "attraction"],
            ["Sea Hotel", "31.1", "121.1", "hotel"],
        ],
        "transportation/distance_matrix.csv": [
            ["31.01,121.01", "31.11,121.11", "40000", "40", "90"],
            ["31.1,121.1", "31.01,121.01", "30000", "30", "70"],
        ],
    },
}
QUERIES = [
    {
        "id": "0",
        "query": "Three days in Beeton from Aville, from Wednesday, November 12, 2025. We are three, in two rooms.",
        "query_with_constraints": "",
        "meta_info": {
            "org": "Aville",
            "dest": ["Beeton"],
            "days": 3,
            "depart_date": "2025-11-12",
            "return_date": "2025-11-14",
            "depart_weekday": 3,
            "people_number": 3,
            "room_number": 2,
            "hard_constraints": {
                "train_cheapest_direct": {"outbound_train_no": "G12"},
                "hotel_star_service_required": {"hotel_name": "Park Inn", "required_service": "Pool"},
                "restaurant_must_eat_named": {"restaurant_name": "Miller's Table"},
                "attraction_must_visit_named": {"attraction_names": ["Old Mill", "City Museum"]},
                "budget_constraint": {"max_budget": 4300},
            },
        },
    },
    {
        "id": "4",
        "query": "A weekend in Deeside from Aville, by plane, on Saturday, November 15, 2025. I am alone.",
        "query_with_constraints": "",
        "meta_info": {
            "org": "Aville",
            "dest": ["Deeside"],
            "days": 2,
            "depart_date": "2025-11-15",
            "return_date": "2025-11-16",
            "depart_weekday": 6,
            "people_number": 1,
            "room_number": 1,
            "hard_constraints": {
                "flight_seat_class": {"outbound_flight_no": "CA101", "inbound_flight_no": "CA202"},
                "hotel_cheapest_star": {"hotel_name": "Sea Hotel"},
                "restaurant_highest_rated": {"restaurant_name": "Fish House"},
                "attraction_all_of_type": {"attraction_names": ["Lighthouse"]},
            },
        },
    },
]
PLANS = {
    "0": """\
Day 1 | Aville -> Beeton | stay: Park Inn | 300
09:00-11:00 | travel_intercity_public | train G12 | Aville South -> Beeton North | 100
11:00-11:15 | buffer | leaving the station
11:15-11:35 | travel_city | Beeton North -> Old Mill | 20
11:35-13:05 | attraction | Old Mill | 40
13:05-13:15 | travel_city | Old Mill -> Miller's Table | 0
13:15-14:15 | meal | Miller's Table | 80
14:15-14:30 | travel_city | Miller's Table -> Park Inn | 12
14:30-15:00 | hotel | Park Inn | checking in
Day 2 | Beeton | stay: Park Inn | 300
08:30-09:00 | hotel | Park Inn | breakfast
09:00-09:25 | travel_city | Park Inn -> River Park | 18
09:25-13:25 | attraction | River Park | 0
13:25-13:35 | travel_city | River Park -> River Kitchen | 0
13:35-14:35 | meal | River Kitchen | 60
14:35-18:00 | buffer | a rest
18:00-19:00 | meal | Harbour Grill | 120
19:00-19:20 | travel_city | Harbour Grill -> Park Inn | 14
19:20-19:40 | hotel | Park Inn
Day 3 | Beeton -> Aville | stay: -
08:30-08:45 | hotel | Park Inn | checking out
08:45-09:00 | travel_city | Park Inn -> City Museum | 15
09:00-11:00 | attraction | City Museum | 55
11:00-11:15 | travel_city | City Museum -> Corner Noodles | 10
11:15-12:15 | meal | Corner Noodles | 30
12:15-16:30 | buffer | time for oneself
16:30-17:00 | travel_city | Corner Noodles -> Beeton North | 22
17:00-19:00 | travel_intercity_public | train G21 | Beeton North -> Aville South | 110
Budget | total | 3100
""",
    "4": """\
Day 1 | Aville -> Deeside | stay: Sea Hotel | 400
07:30-09:30 | travel_intercity_public | flight CA101 | Aville Airport -> Deeside Airport | 500
09:30-10:00 | buffer | baggage
10:00-10:40 | travel_city | Deeside Airport -> Lighthouse | 90
10:40-12:10 | attraction | Lighthouse | 35.5
12:10-12:20 | travel_city | Lighthouse -> Fish House | 0
12:20-13:20 | meal | Fish House | 88
13:20-17:00 | buffer | the beach
17:00-18:00 | meal | Dune Diner | 65
18:00-18:15 | travel_city | Dune Diner -> Sea Hotel | 11
18:15-18:30 | hotel | Sea Hotel
Day 2 | Deeside -> Aville | stay: -
12:00-12:30 | travel_city | Sea Hotel -> Deeside Airport | 70
12:30-14:00 | buffer | boarding
14:00-16:00 | travel_intercity_public | flight CA202 | Deeside Airport -> Aville Airport | 450
Budget | total | 1710
""",
}
# what the plans cost: people × (journeys, meals, tickets) + rooms × nights × price + ways in town
COSTS = {
    "0": 3 * (100 + 40 + 80 + 0 + 60 + 120 + 55 + 30 + 110) + 2 * 2 * 300 + (20 + 12 + 18 + 14 + 15 + 10 + 22),
    "4": 500 + 35.5 + 88 + 65 + 450 + 400 + (90 + 11 + 70),
}
_EXTRA_DAY = """\
Day 3 | Beeton | stay: Park Inn | 300
10:00-14:00 | attraction | Botanic Garden | 20
14:30-15:30 | meal | Garden Cafe | 50
18:00-19:00 | meal | Late Lantern | 70
19:30-19:45 | hotel | Park Inn
Day 4 | Beeton"""
# check or constraint → the problem whose plan is changed, and what is replaced in it
MUTATIONS = {
    "days_as_asked": ("0", ("Day 3 | Beeton", _EXTRA_DAY), ("total | 3100", "total | 4116")),
    "closed_loop": (
        "0",
        ("Beeton -> Aville", "Beeton -> Ceeport"),
        ("G21 | Beeton North -> Aville South", "G31 | Beeton North -> Ceeport Central"),
    ),
    "stations_match": ("0", ("Day 2 | Beeton", "Day 2 | Ceeport")),
    "hotels_exist": ("0", ("Aville -> Beeton | stay: Park Inn | 300", "Aville -> Beeton | stay: Park Inn | 301")),
    "attractions_exist": ("0", ("Old Mill | 40", "Old Mill | 41")),
    "restaurants_exist": ("0", ("Miller's Table | 80", "Miller's Table | 81")),
    "journeys_exist": ("0", ("Beeton North | 100", "Beeton North | 101")),
    "stays_traceable": ("0", ("stay: -", "stay: Park Inn | 300")),
    "days_end_at_hotel": ("0", ("checking in\n", "checking in\n15:00-15:30 | buffer | a rest\n")),
    "enough_meals": (
        "0",
        ("14:35-18:00 | buffer | a rest", "14:35-16:30 | buffer | a rest"),
        ("18:00-19:00 | meal | Harbour", "16:30-17:30 | meal | Harbour"),
    ),
    "enough_attractions": (
        "0",
        (
            "09:25-13:25 | attraction | River Park | 0",
            "09:25-12:25 | attraction | River Park | 0\n12:25-13:25 | buffer",
        ),
    ),
    "no_overlaps": ("0", ("River Park | 0\n", "River Park | 0\n10:00-10:30 | buffer\n")),
    "transfers_fit": ("0", ("14:30-15:00 | hotel", "14:50-15:00 | hotel")),
    "attractions_open": ("0", ("River Park", "Night Market")),
    "restaurants_open": ("0", ("River Kitchen | 60", "Late Lantern | 70")),
    "not_closed_that_day": ("0", ("River Park", "Glass House")),
    "visits_reasonable": (
        "0",
        ("11:35-13:05 | attraction | Old Mill | 40", "11:35-12:05 | attraction | Old Mill | 40\n12:05-13:05 | buffer"),
    ),
    "meals_reasonable": (
        "0",
        ("13:15-14:15 | meal | Miller's Table | 80", "13:15-13:40 | meal | Miller's Table | 80\n13:40-14:15 | buffer"),
    ),
    "total_correct": ("0", ("total | 3100", "total | 4200")),
    "restaurants_differ": ("0", ("meal | Corner Noodles | 30", "meal | River Kitchen | 60")),
    "attractions_differ": (
        "0",
        ("12:15-16:30 | buffer | time for oneself", "12:30-15:30 | attraction | River Park | 0\n15:30-16:30 | buffer"),
    ),
    # the six kinds of hard constraints
    "train_cheapest_direct": ("0", ("G12", "G14")),
    "flight_seat_class": ("4", ("CA101", "CA103")),
    "hotel_star_service_required": ("0", ("Park Inn", "Lake Hotel")),
    "restaurant_must_eat_named": ("0", ("Miller's Table | 80", "Garden Cafe | 50")),
    "attraction_must_visit_named": (
        "0",
        ("11:35-13:05 | attraction | Old Mill | 40", "11:35-15:35 | attraction | Botanic Garden | 20"),
        ("13:05-13:15", "15:35-15:45"),
        ("13:15-14:15", "15:45-16:45"),
        ("14:15-14:30", "16:45-17:00"),
        ("14:30-15:00", "17:00-17:30"),
    ),
    "budget_constraint": ("0", ("Beeton North | 22", "Beeton North | 1522"), ("total | 3100", "total | 4600")),
}
CHINESE = {
    "Aville South": "甲市南站",
    "Aville Airport": "甲市机场",
    "Aville": "甲市",
    "Beeton North": "乙市北站",
    "Beeton": "乙市",
    "Ceeport Central": "丙港站",
    "Ceeport": "丙港",
    "Deeside Airport": "丁岸机场",
    "Deeside": "丁岸",
    "Park Inn": "公园酒店",
    "Lake Hotel": "湖畔酒店",
    "Sea Hotel": "海景酒店",
    "Old Mill": "老磨坊",
    "River Park": "河滨公园",
    "City Museum": "城市博物馆",
    "Botanic Garden": "植物园",
    "Night Market": "夜市",
    "Glass House": "玻璃馆",
    "Lighthouse": "灯塔",
    "Miller's Table": "磨坊餐厅",
    "River Kitchen": "河边厨房",
    "Harbour Grill": "海港烧烤(中心店)",
    "Corner Noodles": "街角面馆",
    "Garden Cafe": "花园咖啡",
    "Late Lantern": "夜灯酒馆",
    "Fish House": "鱼馆",
    "Dune Diner": "沙丘小馆",
    "Thursday,Sunday": "周四,周日",
    "Monday": "周一",
    "Open 24 Hours": "全天开放",
    "Second Class Seat": "二等座",
}


def in_chinese(text):
    """A text with every name replaced."""
    for english, chinese in CHINESE.items():
        text = text.replace(english, chinese)
    return text


def in_language(text, language):
    return in_chinese(text) if language == "zh" else text


def plan(id, language="en", changes=()):
    """A message with the perfect plan of a problem, or with a changed one."""
    text = PLANS[id]
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    return f"<think>\nLet me see.\n</think>\n\nHere it is:\n<plan>\n{in_language(text, language)}</plan>"


def write_benchmark(root, languages=("en", "zh"), queries=QUERIES, tables=TABLES):
    """The benchmark as a checkout with its databases unpacked."""
    for language in languages:
        (root / "data").mkdir(parents=True, exist_ok=True)
        text = in_language(json.dumps(queries, ensure_ascii=False), language)
        (root / f"data/travelplanning_query_{language}.json").write_text(text, encoding="utf-8")
        for id, of_problem in tables.items():
            for name, rows in of_problem.items():
                path = root / f"database/database_{language}/id_{id}/{name}"
                path.parent.mkdir(parents=True, exist_ok=True)
                cells = [[in_language(str(cell), language) for cell in row] for row in rows]
                with path.open("w", encoding="utf-8-sig", newline="") as file:
                    csv.writer(file).writerows([HEADINGS[name].split(","), *cells])
    return root
