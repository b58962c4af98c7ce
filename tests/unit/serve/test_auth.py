"""The gate before the application: keys, hosts, origins, and bodies that are too long, too deep or no JSON."""

from __future__ import annotations

import base64
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.errors import ConfigError
from selfdoubt.serve.http.body import check_body
from selfdoubt.serve.http.process import bind_socket
from selfdoubt.serve.http.settings import ServerSettings, read_keys
from tests.unit.serve.test_app import CHAT, HELLO, fault

KEY = "sesame-0123456789"
BODY = {"messages": HELLO, "max_tokens": 1}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def basic(key, name="anybody"):
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{key}".encode()).decode()}


@pytest.fixture(scope="module")
def open_(serve, talker):
    return serve(talker, body_bytes=4096, depth=8)


@pytest.fixture(scope="module")
def locked(serve, talker):
    return serve(talker, keys=("another-key", KEY))


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/v1/nothing", "/"])
@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), bearer(""), bearer(KEY[:-1]), bearer("é"), {"Authorization": KEY}]
)
def test_without_one_of_the_keys_nothing_is_told(locked, path, headers):
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    reply = locked.get(path, headers=headers)
    error = fault(reply, 401)
    assert error["code"] == "invalid_api_key"
    assert KEY not in reply.text
    assert reply.headers["www-authenticate"].startswith("Basic" if path == "/" else "Bearer")


def test_each_of_the_keys_opens(locked):
    for key in ("another-key", KEY):
        assert locked.get("/v1/models", headers=bearer(key)).status_code == 200
        assert locked.post(CHAT, json=BODY, headers=bearer(key)).status_code == 200
        assert locked.get("/metrics", headers=bearer(key)).status_code == 200
    assert locked.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_health_needs_no_key(locked):
    assert locked.get("/healthz").status_code == 200
    assert locked.get("/readyz").status_code == 200


def test_a_browser_gives_a_key_as_password_for_the_page_but_not_for_the_api(locked):
    fault(locked.get("/", headers=basic(KEY)), 404)  # there is no page here, but the door is open
    fault(locked.get("/", headers=basic("wrong")), 401)
    fault(locked.get("/", headers={"Authorization": "Basic !!"}), 401)
    fault(locked.get("/v1/models", headers=basic(KEY)), 401)  # browsers would send it from other pages, too


def test_keys_are_never_logged_or_shown(serve, talker, caplog):
    settings = ServerSettings(keys=(KEY,))
    assert KEY not in repr(settings)
    client = serve(talker, keys=(KEY,), log_requests=True, log_prompts=True)
    with caplog.at_level(logging.DEBUG):
        client.post(CHAT, json=BODY, headers=bearer(KEY))
        client.post(CHAT, json=BODY, headers=bearer("wrong-key"))
        client.get("/metrics", headers=bearer(KEY))
    assert "POST" in caplog.text
    assert KEY not in caplog.text
    assert "wrong-key" not in caplog.text
    assert KEY not in client.get("/openapi.json", headers=bearer(KEY)).text


def test_clients_are_told_apart_by_key_and_never_by_its_letters(locked, monkeypatch):
    engine = locked.app.state.shared.engine
    seen, submit = [], engine.submit

    def noted(request):
        seen.append(request.client)
        return submit(request)

    monkeypatch.setattr(engine, "submit", noted)
    for key in (KEY, KEY, "another-key"):
        locked.post(CHAT, json=BODY, headers=bearer(key))
    assert seen[0] == seen[1] != seen[2]
    assert not {KEY, "another-key", ""} & {*seen}


def test_keys_come_from_files_one_a_line(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# people\nfirst\n\n  second \nfirst\n")
    assert read_keys([str(file), "third"]) == ("first", "second", "third")
    assert read_keys([]) == ()
    (tmp_path / "none").write_text("# nobody\n")
    for bad in (tmp_path / "none", tmp_path / "missing"):
        with pytest.raises(ConfigError) as caught:
            read_keys([str(bad)])
        assert str(bad) in str(caught.value)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys([str(tmp_path / "binary")])


@pytest.mark.parametrize("bad", [{"keys": ("a b",)}, {"keys": ("",)}, {"keys": ("schlüssel",)}, {"temperature": 3},
                                 {"name": " "}, {"body_bytes": 0}, {"depth": 0}, {"origins": ("example.org",)},
                                 {"origins": ("https://example.org/",)}, {"max_tokens": 0}])  # fmt: skip
def test_settings_out_of_range_are_refused_without_showing_a_key(bad):
    with pytest.raises(ConfigError) as caught:
        ServerSettings(**bad)
    assert "schlüssel" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1:80", "localhost", "LOCALHOST:8000", "[::1]:8000", "[::1]", "127.8.8.8"])
def test_this_machine_has_several_names(open_, host):
    assert open_.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "192.168.0.9", "localhost.evil.example", "", "::"])
def test_without_keys_other_names_are_refused_because_they_may_be_rebound(open_, host):
    assert fault(open_.get("/v1/models", headers={"host": host}), 403)["code"] == "host_not_allowed"


def test_a_further_name_can_be_allowed(serve, talker):
    client = serve(talker, hosts=("model.internal",))
    assert client.get("/v1/models", headers={"host": "model.internal:80"}).status_code == 200
    fault(client.get("/v1/models", headers={"host": "other.internal"}), 403)


def test_with_keys_any_name_will_do(locked):
    assert locked.get("/v1/models", headers={"host": "evil.example", **bearer(KEY)}).status_code == 200


def test_web_pages_elsewhere_may_not_ask_unless_allowed(serve, open_, talker):
    page = {"origin": "https://page.example"}
    assert fault(open_.post(CHAT, json=BODY, headers=page), 403)["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in open_.get("/v1/models", headers=page).headers
    assert open_.post(CHAT, json=BODY, headers={"origin": "http://127.0.0.1"}).status_code == 200
    allowing = serve(talker, origins=("https://page.example",), keys=(KEY,))
    asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    before = allowing.options(CHAT, headers=asked)
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == "https://page.example"
    reply = allowing.post(CHAT, json=BODY, headers={**page, **bearer(KEY)})
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
    fault(allowing.post(CHAT, json=BODY, headers={"origin": "https://other.example", **bearer(KEY)}), 403)
    refused = allowing.post(CHAT, json=BODY, headers=page)
    fault(refused, 401)
    assert refused.headers["access-control-allow-origin"] == "https://page.example"  # so that the page can say why


def post(client, content, **headers):
    headers = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return client.post(CHAT, content=content, headers=headers)


def test_a_body_that_is_too_long_is_413_with_and_without_its_length(open_):
    long = json.dumps({"messages": [{"role": "user", "content": "a" * 5000}]}).encode()
    assert fault(post(open_, long), 413)["code"] == "body_too_large"
    fault(post(open_, iter([long[:100]] * 100)), 413)
    fault(post(open_, b"x" * 400_000), 413)
    fault(post(open_, long, expect="100-continue"), 413)
    assert post(open_, iter([json.dumps(BODY).encode()])).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"), (b"  \n", "empty"), (b"{", "not JSON"), (b"{'a': 1}", "not JSON"), (b"hello", "not JSON"),
        (b'{"a": NaN}', "NaN"), (b'{"a": -Infinity}', "-Infinity"), (b'{"a": 1e999}', "too large"),
        (b'\xff{"a": 1}', "not UTF-8: byte 0xff at position 0"), ('{"a": "ü"}'.encode("latin-1"), "not UTF-8"),
        ('{"a": "ü"}'.encode("utf-16"), "not UTF-8"), (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"), (b'{"n": ' + b"9" * 3000 + b"}", "n:"),
        (b"[" * 200 + b"]" * 200, "nested"), (b'{"a":' * 9 + b"1" + b"}" * 9, "nested"), (b"[1, 2]", "body"),
        (b'"text"', "body"), (b"null", "body"), (b"\xef\xbb\xbf{}", "BOM"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_told_why_in_one_line(open_, body, words):
    error = fault(post(open_, body), 400)
    assert words in error["message"]
    assert "\n" not in error["message"]


def test_a_body_of_another_kind_is_refused(open_):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):  # what any page may send
        fault(post(open_, json.dumps(BODY).encode(), content_type=kind), 400)
    assert post(open_, json.dumps(BODY).encode(), content_type="application/json; charset=utf-8").status_code == 200


def test_a_pair_of_surrogates_is_a_character(open_):
    body = b'{"max_tokens": 1, "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    assert post(open_, body).status_code == 200


def test_depth_is_counted_in_levels():
    for depth in (1, 2, 7):
        check_body(b"[" * depth + b"]" * depth, depth)
        with pytest.raises(ValueError, match="nested"):
            check_body(b"[" * (depth + 1) + b"]" * (depth + 1), depth)
    with pytest.raises(ValueError, match="nested"):
        check_body(b"[" * 500_000, 32)
    check_body(json.dumps([[1] * 1000, {"a": [2]}]).encode(), 3)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
def test_any_json_of_little_depth_passes(data):
    check_body(json.dumps(data).encode(), 40)
    check_body(json.dumps(data, ensure_ascii=False).encode(), 40)


@given(st.binary(max_size=40))
def test_any_bytes_either_pass_or_are_refused_in_one_line(data):
    refused = None
    try:
        check_body(data, 5)
    except ValueError as error:
        refused = str(error)
    if refused is None:
        json.loads(data)
    else:
        assert "\n" not in refused


@pytest.mark.timeout(60)  # quadratic would be hours
def test_a_long_body_is_checked_in_linear_time():
    """Unclosed quotes, brackets and escapes: the limit ends what hangs, and does not measure."""
    for body in (b'"\\' * 500_000, b"[{}," * 250_000, b'{"a":' * 200_000, b'["' + b'\\"' * 500_000):
        with pytest.raises(ValueError, match="the body"):
            check_body(body, 32)


def test_without_a_key_only_this_machine_can_be_bound():
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="--api-key"):
            bind_socket(host, 0, keys=False)
    for host, keys in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        bind_socket(host, 0, keys=keys).close()


def test_a_port_in_use_is_said_in_one_line():
    with bind_socket("127.0.0.1", 0, keys=False) as own:
        own.listen()
        said = r"Cannot bind 127.0.0.1:\d+: address already in use. Try --port 0."
        with pytest.raises(ConfigError, match=said) as caught:
            bind_socket("127.0.0.1", own.getsockname()[1], keys=False)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="not an address"):
        bind_socket("no.such.host.invalid", 0, keys=True)
