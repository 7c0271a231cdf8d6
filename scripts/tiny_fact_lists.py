"""The lists behind the facts, written for this purpose."""

from __future__ import annotations

import string

LETTERS = string.ascii_lowercase
PLACES = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()


def _pairs(text: str) -> dict[str, str]:
    """{"hot": "cold", "the sky": "blue", …} from "hot:cold the_sky:blue …"."""
    return dict(pair.replace("_", " ").split(":") for pair in text.split())


OPPOSITES = _pairs("""
hot:cold big:small up:down left:right open:closed full:empty fast:slow hard:soft heavy:light happy:sad old:young good:bad
high:low long:short wet:dry early:late day:night black:white rich:poor strong:weak thick:thin wide:narrow loud:quiet
clean:dirty sweet:sour true:false first:last inside:outside above:below before:after always:never love:hate win:lose
give:take buy:sell push:pull begin:end near:far brave:afraid cheap:expensive easy:difficult bright:dark smooth:rough
sharp:blunt front:back north:south east:west summer:winter more:less yes:no alive:dead same:different war:peace
question:answer remember:forget friend:enemy laugh:cry
""")
CONTINENTS = {
    country: continent
    for continent, countries in {
        "Europe": """Austria Belgium Bulgaria Croatia Denmark Estonia Finland France Germany Greece Hungary Iceland Ireland
            Italy Latvia Lithuania Netherlands Norway Poland Portugal Romania Serbia Slovakia Slovenia Spain Sweden
            Switzerland Ukraine United_Kingdom""",
        "Asia": """China India Indonesia Iran Iraq Israel Japan Lebanon Malaysia Mongolia Nepal Pakistan Philippines
            South_Korea Thailand Vietnam""",
        "Africa": "Egypt Ethiopia Ghana Kenya Morocco Nigeria Senegal",
        "South America": "Argentina Brazil Chile Colombia Peru Uruguay",
        "North America": "Canada Cuba Mexico",
    }.items()
    for country in countries.split()
}
SOUNDS = _pairs("""
cat:meow dog:woof cow:moo sheep:baa duck:quack pig:oink horse:neigh lion:roar owl:hoot bee:buzz snake:hiss mouse:squeak
frog:croak bird:tweet
""")
YOUNG = _pairs("""
cat:kitten dog:puppy cow:calf sheep:lamb horse:foal pig:piglet goat:kid bear:cub duck:duckling hen:chick deer:fawn
frog:tadpole kangaroo:joey swan:cygnet owl:owlet
""")
HOMES = _pairs("""
bird:nest bee:hive fish:water bear:cave horse:stable cow:barn rabbit:burrow fox:den spider:web lion:savanna camel:desert
penguin:ice monkey:jungle pig:sty frog:pond king:castle
""")
LEGS = _pairs("""
a_dog:4 a_cat:4 a_horse:4 a_cow:4 a_sheep:4 a_bird:2 a_duck:2 a_hen:2 a_spider:8 an_ant:6 a_bee:6 a_fly:6 a_snake:0 a_fish:0
a_human:2 a_crab:10
""")
COLOURS = _pairs("""
snow:white milk:white salt:white coal:black the_night:black a_raven:black grass:green a_frog:green a_cucumber:green
the_sky:blue the_ocean:blue a_tomato:red blood:red a_strawberry:red a_rose:red a_banana:yellow the_sun:yellow a_lemon:yellow
chocolate:brown a_bear:brown coffee:brown a_carrot:orange a_pumpkin:orange an_elephant:grey a_mouse:grey a_flamingo:pink
a_pig:pink a_plum:purple
""")
PLURALS = _pairs("""
mouse:mice child:children foot:feet tooth:teeth man:men woman:women goose:geese sheep:sheep fish:fish leaf:leaves wolf:wolves
knife:knives wife:wives life:lives potato:potatoes tomato:tomatoes hero:heroes box:boxes fox:foxes bus:buses class:classes
dish:dishes brush:brushes church:churches bench:benches baby:babies city:cities story:stories family:families lady:ladies
boy:boys day:days key:keys toy:toys cat:cats dog:dogs book:books tree:trees house:houses star:stars apple:apples hand:hands
""")
PAST = _pairs("""
go:went see:saw eat:ate drink:drank run:ran sing:sang swim:swam write:wrote read:read speak:spoke break:broke take:took
give:gave come:came get:got make:made have:had do:did say:said tell:told think:thought buy:bought bring:brought catch:caught
teach:taught find:found fly:flew know:knew grow:grew sleep:slept walk:walked play:played jump:jumped help:helped
""")
NUMBER_WORDS = _pairs("""
zero:0 one:1 two:2 three:3 four:4 five:5 six:6 seven:7 eight:8 nine:9 ten:10 eleven:11 twelve:12 thirteen:13 fourteen:14
fifteen:15 sixteen:16 seventeen:17 eighteen:18 nineteen:19 twenty:20 thirty:30 forty:40 fifty:50 sixty:60 seventy:70
eighty:80 ninety:90
""")
SIDES = _pairs("a_triangle:3 a_square:4 a_rectangle:4 a_pentagon:5 a_hexagon:6 a_heptagon:7 an_octagon:8")
UNITS = {
    "seconds in a minute": "60",
    "minutes in an hour": "60",
    "hours in a day": "24",
    "days in a week": "7",
    "days in a year": "365",
    "weeks in a year": "52",
    "months in a year": "12",
    "years in a century": "100",
    "years in a decade": "10",
    "metres in a kilometre": "1000",
    "grams in a kilogram": "1000",
    "letters in the alphabet": "26",
    "seasons in a year": "4",
    "continents on earth": "7",
    "colours in a rainbow": "7",
    "planets in the solar system": "8",
}
