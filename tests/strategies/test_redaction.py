"""What counts as a secret: by the name of its variable, and by the looks of a text; and what never does."""

import base64

import pytest

from launch.config.choices import CONF_DIR
from launch.config.compose import compose_config
from strategies.redaction import HIDDEN_PLACEHOLDER, kind_of_secret_in, redact

VALUE = "correct-horse-42"
COMMIT = "3f2a9c" * 6 + "b71e"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVP-mB92K27"
SECRET_NAMES = [
    "HF_TOKEN",
    "HF_TOKEN_READ",
    "API_KEY_1",
    "OPENAI_API_KEY2",
    "AWS_SECRET_ACCESS_KEY",
    "DB_PASS",
    "MYSQL_PWD",
    "PGPASSWORD",
    "SSHPASS",
    "SSH_PASSPHRASE",
    "GITHUB_PAT",
    "SENTRY_DSN",
    "SLACK_WEBHOOK_URL",
    "REGISTRY_AUTH",
    "NGROK_AUTHTOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "db_password",
]
NO_SECRETS = {
    "PWD": "/home/me/project",
    "OLDPWD": "correct-horse-42",
    "GOOGLE_APPLICATION_CREDENTIALS": "/usr/share/keys/service.json",
    "HF_TOKEN_PATH": "/usr/share/huggingface/token",
    "TOKEN_FILE": "keys/service.json",
    "SSH_AUTH_SOCK": "/tmp/ssh-XXXX/agent.1",
    "BUILD_CACHE_KEY": COMMIT,
    "SMTP_AUTH": "required",
    "DATABASE_URL": "sqlite:///runs/mlflow.db",
    "SECRET_TTL": "2592000000",
    "TOKENIZERS_PARALLELISM": "false-as-ever",
    "BYPASS": VALUE,
    "SSH_ASKPASS": VALUE,
}


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_the_value_of_a_secretly_named_variable_is_hidden(monkeypatch, name):
    monkeypatch.setenv(name, VALUE)
    assert redact(f"tag={VALUE}, the end") == f"tag={HIDDEN_PLACEHOLDER}, the end"
    assert name in kind_of_secret_in(VALUE)


@pytest.mark.parametrize("name", NO_SECRETS)
def test_paths_commits_and_words_in_variables_are_no_secrets(monkeypatch, name):
    monkeypatch.setenv(name, NO_SECRETS[name])
    assert redact(f"from {NO_SECRETS[name]}") == f"from {NO_SECRETS[name]}"


def test_a_key_that_looks_like_a_commit_and_an_address_with_a_password_are_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", COMMIT)
    monkeypatch.setenv("DATABASE_URL", "postgres://me:word@host/runs")
    assert redact(COMMIT) == HIDDEN_PLACEHOLDER
    assert redact("postgres://me:word@host/runs") == HIDDEN_PLACEHOLDER


BASIC = base64.b64encode(b"me:correct-horse").decode()
TEXTS = {
    f"cookie {JWT};": f"cookie {HIDDEN_PLACEHOLDER};",
    f"Authorization: Basic {BASIC}": f"Authorization: Basic {HIDDEN_PLACEHOLDER}",
    "connect(password='correct horse', port=1)": f"connect(password={HIDDEN_PLACEHOLDER}, port=1)",
    "Server=host;Uid=me;Pwd=correct-horse;": f"Server=host;Uid=me;Pwd={HIDDEN_PLACEHOLDER};",
    "AccountName=a;AccountKey=Zm9vYmFyYmF6cXV4==;End": f"AccountName=a;AccountKey={HIDDEN_PLACEHOLDER};End",
    "https://hooks.slack.com/services/T0AAAA/B0BBBB/c3DdEe now": f"https://hooks.slack.com/{HIDDEN_PLACEHOLDER} now",
    f"WANDB_API_KEY={COMMIT}": f"WANDB_API_KEY={HIDDEN_PLACEHOLDER}",
    f"wandb login {COMMIT}": f"wandb login {HIDDEN_PLACEHOLDER}",
    "export MY_PASS=hunter2hunter2": f"export MY_PASS={HIDDEN_PLACEHOLDER}",
    "PASS='correct horse'; run": f"PASS={HIDDEN_PLACEHOLDER}; run",
    "SSHPASS=correct-horse-42 PGPASSWORD=correct-horse-43": f"SSHPASS={HIDDEN_PLACEHOLDER} PGPASSWORD={HIDDEN_PLACEHOLDER}",
    "s3://me:p@ss@host/rows and https://host:80/me@home": f"s3://{HIDDEN_PLACEHOLDER}@host/rows and https://host:80/me@home",
}


@pytest.mark.parametrize("text", TEXTS)
def test_redaction_hides_a_text_that_looks_like_a_secret_and_keeps_its_surroundings(text):
    assert redact(text) == TEXTS[text]
    assert kind_of_secret_in(text) is not None
    assert redact(TEXTS[text]) == TEXTS[text]


@pytest.mark.parametrize(
    "text",
    [
        f"revision {COMMIT}, wandb @ {COMMIT}",
        "Basic understanding of Basic programming",
        "PWD=/home/me OLDPWD=/home/you",
        "password=None, password=${oc.env:WORD}, password=<yours>",
        "https://host:8443/v1",
        'export MY_PASS=$(cat ~/.password) MY_PASS="$OTHER_SECRET" MY_PASS=/run/secrets/password',
        "BYPASS=correct-horse-42 SSH_ASKPASS=correct-horse-42 first_pass=20261130 last_pass=run_again(step)",
    ],
)
def test_redaction_keeps_ordinary_texts(text):
    assert redact(text) == text
    assert kind_of_secret_in(text) is None


def test_no_setting_of_an_experiment_is_masked(monkeypatch):
    for name, value in NO_SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PWD", str(CONF_DIR.parent))
    for file in sorted(CONF_DIR.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        assert redact(text) == text, file
    for experiment in sorted((CONF_DIR / "experiment").glob("*.yaml"))[:3]:
        text = compose_config([f"experiment={experiment.stem}"], check=False).yaml
        assert redact(text) == text, experiment
