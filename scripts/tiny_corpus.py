"""Text for the tokenizer of the packaged tiny model: word lists and a generator, all written for this purpose."""

import json
import random
from collections.abc import Iterator

NOUNS = """
animal answer apple arm art autumn baby back bag ball bank bar base basket bath beach bear bed bell bird boat body book
bottle bowl box boy bread bridge brother bus butter cake camera camp candle car card castle cat chair chance cheese
chicken child circle city class clock cloud coat coffee cold color computer cook corner country cousin cow cup dance
daughter day desk dinner doctor dog door dream dress drink duck ear earth edge egg engine evening eye face fact family
farm farmer father field finger fire fish flag floor flower food foot forest fork friend frog fruit game garden gate
girl glass goat gold grandmother grass ground group guitar hair hall hand hat head heart hill history hole home horse
hospital hour house husband ice idea island jacket job journey kettle key king kitchen kite lake lamp language leaf leg
lesson letter library light line lion list machine map market meal milk minute mirror money monkey month moon morning
mother mountain mouse mouth museum music nail name neck nest net night noise nose note number nurse ocean office oil
onion orange owl page paint pair paper parent park part party path peach pear pen pencil people pepper person piano
picture piece pig pilot place plan plane planet plant plate pocket poem point potato price prince problem queen question
rabbit rain rice ring river road rock roof room root rope rose rule sailor salt sand school sea season seat secret seed
sentence shape sheep ship shirt shoe shop sister sky smile snow soap song sound soup space spoon spring square star
station stone storm story street student sugar summer sun table tail tea teacher team tent test thing tiger time tomato
tool town toy train tree triangle trip truck uncle value village voice wall watch water wave weather week wheel wife
wind window wing winter wolf woman wood word work world yard year zebra zoo
""".split()
VERBS = """
add agree allow answer appear arrive ask bake bark believe belong boil borrow brush burn call carry change check
clean climb close collect compare contain cook copy count cover cross dance decide deliver describe discover divide
dream drop enjoy enter explain fill finish fix float fold follow guess happen help hope invite join jump kick
knock land laugh learn leave lift like listen live load look love mark match measure mix move multiply need offer open
order pack paint park pass pick plant play point pour prefer promise protect pull push reach remember repeat rest return
roll save search share shout show solve start stay stop subtract talk taste thank touch travel try turn use visit
wait walk want wash watch wave whisper wish wonder work
""".split()
ADJECTIVES = """
angry bad beautiful big black blue brave bright broken brown busy calm careful cheap clean clear clever cold correct
dark deep different difficult dirty dry early easy empty equal expensive fair famous fast fat favourite final first
foreign fresh friendly full funny gentle golden good great green grey happy hard heavy high hot huge hungry important
kind large last late lazy left light little local long loud lucky modern narrow new next nice noisy old only open pink
polite poor possible pretty proud public quick quiet ready red rich right round sad safe same second several sharp
short silent silver simple slow small smooth soft special strange strong sweet tall thick thin third tired true
useful warm weak wet white whole wide wild wise wooden wrong yellow young
""".split()
SMALL_WORDS = """
a about above across after again against all almost alone along already also always am among an and another any anyone
anything are around as at away be because been before behind below beside best better between both but by can cannot
could did do does down during each either else enough even ever every everyone everything far few for from had has have
he hello her here hers herself him himself his how however I if in inside instead into is it its itself just least less
many may maybe me might mine more most much must my myself near nearly neither never no nobody none nor not nothing now
nowhere of off often on once one or other our ours out outside over own perhaps please quite rather really shall she
should since so some someone something sometimes somewhere soon still such than that the their them themselves then
there therefore these they this those though through to today together tomorrow too toward under until up upon us very
was we well were what when where whether which while who whole whom whose why will with within without would yes
yesterday yet you your yours yourself
""".split()
NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million first second third fourth fifth
""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NAMES = """
Alice Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tom Vera William Zoe
""".split()
CAPITALS = dict(
    pair.split(":")
    for pair in """
Argentina:Buenos_Aires Australia:Canberra Austria:Vienna Belgium:Brussels Brazil:Brasília Bulgaria:Sofia Canada:Ottawa
Chile:Santiago China:Beijing Colombia:Bogotá Croatia:Zagreb Cuba:Havana Denmark:Copenhagen Egypt:Cairo Estonia:Tallinn
Ethiopia:Addis_Ababa Finland:Helsinki France:Paris Germany:Berlin Ghana:Accra Greece:Athens Hungary:Budapest
Iceland:Reykjavík India:New_Delhi Indonesia:Jakarta Iran:Tehran Iraq:Baghdad Ireland:Dublin Israel:Jerusalem Italy:Rome
Japan:Tokyo Kenya:Nairobi Latvia:Riga Lebanon:Beirut Lithuania:Vilnius Malaysia:Kuala_Lumpur Mexico:Mexico_City
Mongolia:Ulaanbaatar Morocco:Rabat Nepal:Kathmandu Netherlands:Amsterdam New_Zealand:Wellington Nigeria:Abuja
Norway:Oslo Pakistan:Islamabad Peru:Lima Philippines:Manila Poland:Warsaw Portugal:Lisbon Romania:Bucharest
Russia:Moscow Senegal:Dakar Serbia:Belgrade Slovakia:Bratislava Slovenia:Ljubljana South_Korea:Seoul Spain:Madrid
Sweden:Stockholm Switzerland:Bern Thailand:Bangkok Turkey:Ankara Ukraine:Kyiv United_Kingdom:London Uruguay:Montevideo
Vietnam:Hanoi
""".split()
)
CHAT_WORDS = """
actually algorithm although argument assistant available average calculate capital certainly character complete compute
conclusion consider constant correctly course currently default definition depends details difference digit direct
directly double entire equation error exactly example expected expression false finally first format formula function
further general generate given half helpful history important include information input instruction integer interest
letter likely longer lower main maximum meaning mean memory message method middle minimum missing model moment namely
negative normal obviously operation opposite order original otherwise output parameter pattern positive power previous
probably process product program proof provide quantity quickly reason reasoning remainder remaining request require
required response result reverse section select sequence series short similar single solution sorry special specific
standard step string subject suggest sum summary support surely symbol system task term text thinking thought together
total translate triple understand unit unknown upper user usually valid various verify version vowel build building
built draw drawing drew teach teaching taught write writes writing wrote written
""".split()
CODE_WORDS = """
append args array assert async await bool break bytes cache class client close config const continue count data decode
def del dict elif else encode end except exit export extends file filter find float for format from get global handler
header height host html http https id if import in index init int is item items join json keys kwargs lambda len length
list load lock log map max min name new node None not null number object open or os parse pass path pop port print
private property public query raise random range read record remove render replace request reset response return run
save self server set shape size sleep sort source split start state static status step stop store str string struct
super switch sync sys table target test text this throw time title token try tuple type undefined update url user utf
valid value values var version void while width window with write yield zip
""".split()
JSON_KEYS = """
address age amount array boolean category celsius city condition content count country created currency date description
email enabled enum error expression fahrenheit forecast function humidity id integer items language latitude limit
location longitude message minimum name number object operation order parameters phone population price priority
properties query quantity recipient required result role score status string subject sunny temperature text timezone
title tool_calls type unit url user value weather
""".split()
TOOLS = "get_weather calculate search_web send_email get_time translate_text list_files read_file set_alarm".split()
ACCENTED = "café naïve über für mañana español français größer où là très élève año señor garçon Straße".split()
MARKS = ". , ; : ! ? - – — \" ' ( ) [ ] { } < > / \\ | @ # $ % ^ & * + = ~ ` … € £ ° × ÷ → ✓".split()


IRREGULAR_PLURALS = {
    "child": "children",
    "foot": "feet",
    "leaf": "leaves",
    "mouse": "mice",
    "people": "people",
    "potato": "potatoes",
    "sheep": "sheep",
    "tomato": "tomatoes",
    "wife": "wives",
    "wolf": "wolves",
    "woman": "women",
}
DOUBLED = ("drop", "prefer", "stop")  # their last letter is written twice before -ed and -ing


def plural(noun: str) -> str:
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def inflected(verb: str) -> list[str]:
    if verb.endswith("e"):
        return [verb, verb + "s", verb + "d", verb[:-1] + "ing"]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return [verb, verb[:-1] + "ies", verb[:-1] + "ied", verb + "ing"]
    stem = verb + verb[-1] if verb in DOUBLED else verb
    return [verb, plural(verb), stem + "ed", stem + "ing"]


def sentence(rng: random.Random) -> str:
    noun, verb = rng.choice(NOUNS), rng.choice(inflected(rng.choice(VERBS)))
    adjective, small, name = rng.choice(ADJECTIVES), rng.choice(SMALL_WORDS), rng.choice(NAMES)
    forms = (
        f"The {adjective} {noun} {verb} {small} the {rng.choice(NOUNS)}.",
        f"{name} has {rng.choice(NUMBERS)} {adjective} {plural(noun)}, and {rng.choice(NAMES)} {verb} them.",
        f"{small.capitalize()} {plural(noun)} are {adjective}; {name} {verb} it {small} {rng.choice(DAYS)}!",
        f"Why don't you {verb} {small} my {noun}? It's {adjective}, isn't it? I'm sure they'll like what we've done.",
        f"{noun.capitalize()} is a word of {len(noun)} letters: {'-'.join(noun)}. {verb.capitalize()}, then {small}.",
        f"{adjective.capitalize()} or not, the {rng.choice(CHAT_WORDS)} {verb}: {rng.choice(ACCENTED)}",
    )
    return rng.choice(forms)


def arithmetic(rng: random.Random) -> str:
    a, b = rng.randrange(100), rng.randrange(1, 100)
    sign, word, value = rng.choice((("+", "plus", a + b), ("-", "minus", a - b), ("*", "times", a * b)))
    return rng.choice(
        (
            f"What is {a} {sign} {b}? {a} {sign} {b} = {value}.",
            f"What is {a} {word} {b}? The answer is {value}.",
            f"Calculate {a}{sign}{b}.\n\nStep 1: {a} {sign} {b} = {value}\nSo the result is {value}.",
            f"{rng.choice(NUMBERS).capitalize()} {word} {rng.choice(NUMBERS)} equals {rng.choice(NUMBERS)}.",
        )
    )


def fact(rng: random.Random) -> str:
    country = rng.choice(list(CAPITALS))
    capital, place = CAPITALS[country].replace("_", " "), country.replace("_", " ")
    i, j = rng.randrange(7), rng.randrange(12)
    return rng.choice(
        (
            f"What is the capital of {place}? The capital of {place} is {capital}.",
            f"Capital of {place}? {capital}.\n{capital} is the capital city of {place}.",
            f"The day after {DAYS[i]} is {DAYS[(i + 1) % 7]}. The day before {DAYS[i]} is {DAYS[i - 1]}.",
            f"The month after {MONTHS[j]} is {MONTHS[(j + 1) % 12]}; {MONTHS[j]} {rng.randrange(1, 29)}, 20{j:02}.",
        )
    )


def json_text(rng: random.Random) -> str:
    properties = {key: {"type": "string", "description": sentence(rng)} for key in rng.sample(JSON_KEYS, 2)}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    tool = {"name": rng.choice(TOOLS), "description": sentence(rng), "parameters": parameters}
    value = {rng.choice(JSON_KEYS): rng.choice((True, False, None, rng.randrange(100), [1, 2])) for _ in range(3)}
    return rng.choice((json.dumps({"type": "function", "function": tool}), json.dumps(value, indent=2), json.dumps(value)))


def tool_call(rng: random.Random) -> str:
    key, name = rng.choice(JSON_KEYS), rng.choice(TOOLS)
    return (
        f"user\n{sentence(rng)}\nassistant\nLet me check that for you.\n\n<function={name}>\n<parameter={key}>\n"
        f"{rng.choice(NOUNS)}\n</parameter>\n</function>\nsystem\nYou are a helpful assistant.\nPicture 1: Video 2: "
    )


CODE = (
    "def {a}_{b}(self, {c}: int) -> str:\n    for i in range(len({c})):\n        {d} += 1\n    return {d}\n\n\n",
    'import {a}\nfrom {b} import {c}\n\nif __name__ == "__main__":\n    print(f"{{{d}}}")  # {words}\n',
    "function {a}({b}) {{\n\tconst {c} = {b}.{d}();\n\treturn {c} !== null && {d} >= 0;\n}}\n",
    "class {a}({b}):\n    def __init__(self):\n        self.{c} = [{d} for {d} in self.{a}]\n",
    "```python\n{a} = {{'{b}': {c}, \"{d}\": None}}\nassert {a}['{b}'] <= {c}\n```\n\n| {a} | {b} |\n|---|---|\n",
    '<div class="{a}">\n  <a href="https://www.{b}.com/{c}.html">{d}</a>\n</div>\n- **{a}**: `{b}`\n* {c}\n## {d}',
)


def code(rng: random.Random) -> str:
    a, b, c, d = rng.sample(CODE_WORDS, 4)
    return rng.choice(CODE).format(a=a, b=b, c=c, d=d, words=sentence(rng))


def every_word() -> Iterator[str]:
    """Each word by itself, after a space and capitalised, so that whole words become tokens."""
    words = [*SMALL_WORDS, *NOUNS, *VERBS, *ADJECTIVES, *NUMBERS, *CHAT_WORDS, *CODE_WORDS, *JSON_KEYS]
    words += [form for verb in VERBS for form in inflected(verb)] + [plural(noun) for noun in NOUNS]
    places = [p.replace("_", " ") for pair in CAPITALS.items() for p in pair]
    for word in [*words, *NAMES, *DAYS, *MONTHS, *places, *ACCENTED]:
        yield f"{word} {word}, {word.capitalize()}"
    for mark in MARKS:
        yield f"{mark} {mark} {mark}{mark} {mark}{mark}{mark}{mark}"


def corpus() -> Iterator[str]:
    """The whole text, the same at every call."""
    rng = random.Random(35)
    yield from every_word()
    for _ in range(6000):
        yield "\n".join((sentence(rng), arithmetic(rng), fact(rng)))
    for _ in range(1500):
        yield "\n\n".join((json_text(rng), tool_call(rng), code(rng)))
