"""`loramix.yaml`: overlays, variables, and a sentence for every mistake."""

import re
from contextlib import closing
from pathlib import Path

import pytest

import loramix
from loramix.engine.local import LocalEngine
from loramix.errors import LoramixError, SettingsError
from loramix.folders import POCKET_LIBRARY
from loramix.formats import peft
from loramix.library import Library
from loramix.lm import has_router
from loramix.mix import Mix
from loramix.route.fixed import FixedRouter, RulesRouter
from loramix.serve.opening import open_service, problems
from loramix.serve.service import Service
from loramix.serve.settings import (
    AdapterSettings,
    BaseSettings,
    EngineSettings,
    KeySettings,
    LimitSettings,
    RouterSettings,
    Settings,
    load,
)
from loramix.store.keys import new_secret
from tests.tiny import random_adapter, tiny_base

SECRET = new_secret()
FIXED = FixedRouter(Mix.parse("sql"))
ROOT = Path(__file__).parents[2]
DOCUMENT, EXAMPLE = ROOT / "docs" / "server.md", ROOT / "examples" / "loramix.yaml"


@pytest.fixture
def written(tmp_path):
    def write(text, name="loramix.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_nothing_said_is_pocket_on_loopback():
    assert load([]) == Settings()
    assert (Settings().model.model, Settings().host, Settings().port) == (
        "pocket",
        "127.0.0.1",
        8000,
    )


def test_later_files_and_assignments_win_and_mappings_merge(written):
    first = written("base: {model: a/b, dtype: float32}\nengine: {max_batch: 4}\nport: 1\n")
    second = written("engine: {max_queue: 7}\nport: 2\n", "over.yaml")
    settings = load([first, second], ["port=3", "base.dtype=bfloat16"])
    assert settings.port == 3
    assert settings.base.model_dump(exclude_defaults=True) == {"model": "a/b", "dtype": "bfloat16"}
    assert settings.engine.options() == {"max_batch": 4, "max_queue": 7}


def test_variables_are_read_as_yaml_reads_them(written, monkeypatch):
    monkeypatch.setenv("PORT", "99")
    path = written('port: ${env.PORT}\nhost: ${env.HOST_GIVEN | ::1}\nlibrary: "x-${env.PORT}"\n')
    settings = load([path])
    assert (settings.port, settings.host, settings.library) == (99, "::1", "x-99")


@pytest.mark.parametrize("value", ["/data/x #1", "a: [", "*x", "\tx", "{", "-", "", "true x"])
def test_a_variable_is_one_value_whatever_is_in_it(written, monkeypatch, value):
    monkeypatch.setenv("PLACE", value)
    if value:
        assert load([written("library: ${env.PLACE}\n")]).library == value
    assert load([written('library: "${env.PLACE}"\n')]).library == value


def test_a_number_in_quotes_is_a_text(written, monkeypatch):
    monkeypatch.setenv("PLACE", "0123")
    assert load([written('library: "${env.PLACE}"\n')]).library == "0123"


def test_a_folder_is_no_file_of_settings(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load([tmp_path])


def test_a_component_block_of_other_servers(written):
    path = written(
        "component:\n  type: model\n  task: text-generation\n  model: org/base\n  peft_adapters:\n"
        "    - {type: lora, name: a, model: org/a, weight: 0.45, precision: float32,\n"
        "       quantization: none, low_cpu_mem_usage: true}\n"
        "    - {type: lora, name: b, model: org/b, weight: 0.55}\n"
    )
    settings = load([path])
    assert settings.model.model == "org/base"
    assert settings.mix == "a:0.45+b:0.55"
    assert [a.precision for a in settings.all_adapters] == ["float32", "auto"]


def test_a_default_mix_that_is_said_wins_over_weights(written):
    path = written("default_mix: base\nadapters: [{name: a, weight: 0.5}]\n")
    assert load([path]).mix == "base"


BAD = {
    "bse: pocket": r"loramix.yaml:1: bse is no setting; did you mean 'base'\?",
    "engine:\n  max_bach: 3": r"yaml:2: engine.max_bach is no setting; did you mean 'max_batch'\?",
    "engine: {max_batch: 0}": r"engine.max_batch: .* greater than or equal to 1, not 0",
    "engine: {max_batch: many}": r"engine.max_batch: input should be a valid integer, not 'many'",
    "engine: {max_batch: 1.5}": r"engine.max_batch: .* integer",
    "engine: {max_batch: true}": r"engine.max_batch: .* integer",
    "engine: {reuse: 1}": r"engine.reuse: .* boolean, not 1",
    "engine: []": r"engine: input should be a mapping",
    "limits: {n: 1000}": r"limits.n: .* less than or equal to 128, not 1000",
    "limits: {timeout_s: 0}": r"limits.timeout_s: .* greater than 0",
    "limits: {time_s: 3}": r"limits.time_s is no setting; did you mean 'timeout_s'\?",
    "port: 70000": r"port: .* less than or equal to 65535",
    "port: '80'": r"port: .* integer, not '80'",
    "host: 3": r"host: .* string, not 3",
    "base: 3": r"base: input should be .*",
    "base: {model: a, dtype: int4}": r"base.dtype: input should be 'auto', .* not 'int4'",
    "base: {model: a, quantize: int4}": r"base.quantize: .* 'none', 'int8' or 'nf4'",
    "base: {mdel: a}": r"base.mdel is no setting; did you mean 'model'\?",
    "router: rulez": r"router.kind: input should be 'auto', .* not 'rulez'",
    "router: {kind: rules}": r"router: kind rules needs file",
    "router: {kind: auto, mix: sql}": r"router: kind fixed needs mix, and no other kind has it",
    "router: {kind: nearest, top: 1}": r"router: only kind auto has top",
    "router: {knd: none}": r"router.knd is no setting; did you mean 'kind'\?",
    "default_mix: 3": r"default_mix: .* string",
    "cors: '*'": r"cors: input should be a list, not '\*'",
    "cors: [1]": r"cors.0: .* string",
    "log_prompts: sometimes": r"log_prompts: .* boolean",
    "adapters: {a: b}": r"adapters: input should be a list",
    "adapters: [a]": r"adapters.0: .*",
    "adapters: [{model: a/b}]": r"adapters.0.name is missing",
    "adapters:\n- name: a\n- name: b\n  wight: 1": r"yaml:4: adapters.1.wight .* mean 'weight'\?",
    "keys: [{name: ada}]": r"keys.0.secret is missing",
    "keys: [{name: ada, secret: hush-hush}]": r"keys.0.secret: expected what `loramix keys secret`",
    "keys: [{name: ada, secret: 8151}]": r"keys.0.secret: input should be a valid string\.",
    f"keys: [{{name: a, secret: {SECRET}, role: root}}]": r"keys.0.role: .* not 'root'",
    f"keys: [{{name: a, secret: {SECRET}, requests_per_minute: 0}}]": r"keys.0.requests_per_minute",
    f"keys: [{', '.join([f'{{name: a, secret: {SECRET}}}'] * 2)}]": r"two keys are called 'a'",
    "adapters: [{name: a}, {name: a}]": r"two adapters are called 'a'",
    "adapters: [{name: 'a+b'}]": r"adapters.0.name: ",
    "adapters: [{name: a, weight: .nan}]": r"adapters.0.weight: .* finite",
    "adapters: [{name: a, weight: heavy}]": r"adapters.0.weight: .* number, not 'heavy'",
    "adapters: [{name: a, precision: int8}]": r"adapters.0.precision: ",
    "adapters: [{name: a, revision: main}]": r"adapters.0: revision is said without model",
    "peft_adapters: [{type: ia3, name: a, model: b/c}]": r"peft_adapters.0.type: .* 'lora'",
    "peft_adapters: [{name: a, model: b/c, quantization: int8}]": r"quantization: .* 'none'",
    "component: {model: a/b, task: image}": r"component.task: ",
    "component: {model: a/b}\nbase: c/d": r"component names the base and its adapters",
    "port: 1\nport: 2": r"yaml:2: 'port' is there twice; keep one",
    "port: ${env.NOT_SET_HERE}": r"yaml:1: the environment variable NOT_SET_HERE is not set",
    "host: ${HOME}": r"'\$\{HOME\}' is no variable; expected \$\{env.NAME\}",
    "- a\n- b": r"holds no mapping",
    "a: [": r"is not YAML that can be read",
    "base: {<<: *x}": r"is not YAML that can be read",
    "base: &a {model: pocket}\nengine: {<<: *a}": r"is not YAML|is no setting",
    "a: !!python/object:os.system {}": r"is not YAML that can be read|is no setting",
    "port: !!int x": r"is not YAML that can be read",
    "base: &a {model: *a}": r"is not YAML that can be read: it goes round in circles|recursi",
}


@pytest.mark.parametrize("text", BAD)
def test_each_mistake_has_its_sentence(written, text):
    with pytest.raises(SettingsError) as failure:
        load([written(text)])
    assert re.search(BAD[text], str(failure.value)), str(failure.value)
    for secret in (SECRET, "hush-hush", "8151"):
        assert secret not in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "assignment",
    ["port", "=3", "a..b=3", "port=[", "engine.max=1", "base.model.x=1", "adapters.0.name=x"],
)
def test_assignments_that_cannot_be_honoured(assignment):
    with pytest.raises(SettingsError, match="--set"):
        load([], [assignment])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SettingsError, match="does not exist; expected a file of settings"):
        load([tmp_path / "none.yaml"])


def test_every_mistake_is_named_at_once(written):
    with pytest.raises(SettingsError, match=r"engine\.max_batch: .* port: "):
        load([written("port: -1\nengine: {max_batch: 0}\n")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: ./nowhere\nlibrary: {0}", "base: ./nowhere is no folder with a config.json"),
        ("library: {0}\nadapters: [{{name: lost}}]", "Adapter 'lost': No adapter 'lost'"),
        ("library: {0}\nadapters: [{{name: a, model: ./x.bin}}]", "./x.bin does not exist"),
        ("library: {0}\nadapters: [{{name: a, model: o/a, device: cuda}}]", "lies where"),
        ("library: {0}\ndefault_mix: auto", "has no router"),
        ("router: {{kind: fixed, mix: nobody}}", "router: No adapter 'nobody'"),
        ("router: {{kind: rules, file: '{0}/no.yaml'}}", "cannot be read as rules"),
        ("library: {0}\nrouter: nearest", "router: No router in"),
        ("default_mix: auto\nrouter: none", "needs the router that router: none leaves out"),
        ("library: {0}\ndefault_mix: 'a:0.5++'", "default_mix: "),
        ("library: {0}\ndefault_mix: lost", "default_mix: No adapter 'lost'"),
        (
            f"keys: [{{{{name: a, secret: {SECRET}, adapters: [nobody]}}}}]",
            "keys: No adapter 'nobody'",
        ),
        ("library: {0}\nroots: [./lost]", "roots: ./lost is no folder"),
    ],
)
def test_what_validate_finds_without_weights(written, tmp_path, text, said):
    (found,) = problems(load([written(text.format(tmp_path / "library"))]))
    assert said in found


def test_a_service_is_what_the_settings_say(tmp_path):
    tiny, base = tiny_base(), tmp_path / "base"
    tiny.model.save_pretrained(base)
    tiny.tokenizer.save_pretrained(base)
    model = tiny.model
    adapter = random_adapter(model, "a", seed=1)
    peft.write(adapter, tmp_path / "given")
    (tmp_path / "s.yaml").write_text(
        f"base: {base}\nlibrary: {tmp_path / 'library'}\nroots: [{tmp_path}]\n"
        f"adapters:\n- {{name: a, model: {tmp_path / 'given'}, weight: 0.5, precision: bfloat16,\n"
        f"   system_prompt: Be kind.}}\n"
        f"keys: [{{name: ada, secret: {SECRET}, adapters: [a], requests_per_minute: 9}}]\n"
        "engine: {max_batch: 3}\nlimits: {n: 2}\ncors: ['http://page']\n"
    )
    with closing(open_service(load([tmp_path / "s.yaml"]))) as service:
        key = service.store.keys.find(SECRET)
        assert (key.name, key.role, key.adapters, key.requests_per_minute) == (
            "ada", "user", ("a",), 9,
        )  # fmt: skip
        assert isinstance(service.lm.engine, LocalEngine)
        assert service.lm.engine.adapters == ("a",)
        assert (service.default_mix, service.limits.n) == ("a:0.5", 2)
        assert (service.cors, service.roots) == (("http://page",), (tmp_path,))
        assert service.system_prompts == {"a": "Be kind."}
    again = load([tmp_path / "s.yaml"])
    open_service(again).close()  # the same content is there already
    other = random_adapter(model, "a", seed=2)
    Library(tmp_path / "library").put(other, replace=True)
    with pytest.raises(LoramixError, match="another adapter called 'a' than"):
        open_service(again)


def test_a_router_of_the_settings(tmp_path):
    (tmp_path / "rules.yaml").write_text("rules: {sql: select}")
    settings = load([], [f"router={{kind: rules, file: {tmp_path}/rules.yaml}}"])
    assert problems(settings) == []
    router = settings.router.opened(settings.shelf)
    assert isinstance(router, RulesRouter)
    assert router.adapters == ("sql",)
    given = load([], ["router={thresholds: {sql: 7}, fade: true, top: 1}"])
    gate = given.router.opened(given.shelf).gate
    assert (gate.abstain.thresholds[gate.adapters.index("sql")], gate.fades, gate.top) == (
        7,
        True,
        1,
    )
    assert given.router.reopened(given.shelf).gate.top == 1
    assert load([], ["router.kind=none"]).router.opened(settings.shelf) is False
    assert load([]).router.opened(settings.shelf) is True


def test_a_server_of_pocket_changes_a_copy_of_its_library(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAMIX_LIBRARY", str(tmp_path / "own"))
    before = Library(POCKET_LIBRARY).names()
    first = load([]).shelf
    assert first.folder.parent == tmp_path
    assert (first.names(), has_router(first)) == (before, True)
    first.remove("sql")
    assert "sql" not in load([]).shelf
    assert Library(POCKET_LIBRARY).names() == before
    assert load([], ["library=elsewhere"]).shelf.folder == Path("elsewhere")
    assert load([], ["base=a/b"]).shelf.folder == tmp_path / "own"


@pytest.mark.parametrize(("router", "mix"), [(False, "base"), (True, "auto"), (FIXED, "auto")])
def test_who_names_no_mix_is_routed_if_anything_routes(shop, router, mix):
    with loramix.open(shop.base, shop.library, router=router) as lm:
        assert Service(lm).default_mix == mix


def test_the_document_names_every_setting():
    section = DOCUMENT.read_text("utf-8").partition("\n## Settings\n")[2].partition("\n## ")[0]
    said = set(re.findall(r"^\| `([\w.]+)` \|", section, re.M))
    known = set()
    sections = {
        "base": BaseSettings,
        "adapters": AdapterSettings,
        "engine": EngineSettings,
        "limits": LimitSettings,
        "keys": KeySettings,
        "router": RouterSettings,
    }
    for name in Settings.model_fields:
        inner = sections[name].model_fields if name in sections else ()
        known |= {f"{name}.{field}" for field in inner} or {name}
    assert said == known


def test_the_example_is_good():
    assert problems(load([EXAMPLE])) == []
