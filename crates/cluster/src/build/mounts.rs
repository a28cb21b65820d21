//! What `RUN --mount` and the options `--secret` and `--ssh` of the command ask for.
//!
//! Upstream: BuildKit's frontend/dockerfile/instructions, whose words the errors have.

use std::path::{Path, PathBuf};

use minke_runtime::caches::Sharing;

use super::dockerfile::meant;

/// Most bytes of a secret, as upstream.
pub const SECRET_MAX: u64 = 500 << 10;

/// One `--mount` of a RUN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub kind: Kind,
    /// As given; empty when it may be left out and was.
    pub target: String,
    pub readonly: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Files of the context, of a stage or of an image. What is written to them is lost.
    Bind { from: Option<String>, source: String },
    /// A directory that later builds find as this one leaves it.
    Cache { id: String, sharing: Sharing, owner: Owner },
    /// Bytes; 0 is no limit.
    Tmpfs { size: u64 },
    /// A file, or a variable of the environment, or both.
    Secret { id: String, required: bool, variable: Option<String>, owner: Owner },
    /// The socket of an agent.
    Ssh { id: String, required: bool },
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    pub mode: Option<u32>,
    pub uid: u32,
    pub gid: u32,
}

/// All that can be said of a mount, before it is known which kind it is.
#[derive(Default)]
struct Fields {
    kind: Option<String>,
    from: Option<String>,
    source: Option<String>,
    target: Option<String>,
    readonly: Option<bool>,
    required: Option<bool>,
    size: Option<u64>,
    id: Option<String>,
    sharing: Option<Sharing>,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    variable: Option<String>,
}

const KEYS: &[&str] = &[
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "ro",
    "rw",
    "readwrite",
    "destination",
    "size",
    "env",
];
const KINDS: &[&str] = &["bind", "cache", "tmpfs", "secret", "ssh"];

/// Reads one mount; `expand` undoes variables.
pub fn parse(text: &str, expand: impl Fn(&str) -> Result<String, String>) -> Result<Mount, String> {
    let mut all = Fields::default();
    for field in fields(text)? {
        let (key, value) = field.split_once('=').map_or((&*field, None), |(key, value)| (key, Some(value)));
        let key = key.to_ascii_lowercase();
        if key == "from" && value.is_some_and(|value| value.contains('$')) {
            return Err("'from' doesn't support variable expansion, define alias stage instead".to_owned());
        }
        let value = value.map(&expand).transpose()?;
        let switch = matches!(key.as_str(), "readonly" | "ro" | "readwrite" | "rw" | "required");
        let value = match value {
            None if switch => "true".to_owned(),
            None => return Err(format!("invalid field '{field}' must be a key=value pair")),
            Some(value) => value,
        };
        let wrong = || format!("invalid value for {key}: {value}");
        let number = |radix| {
            u32::from_str_radix(&value, radix).map_err(|_| format!("invalid value {value} for {key}"))
        };
        match key.as_str() {
            "type" => {
                let kind = value.to_ascii_lowercase();
                if !KINDS.contains(&&*kind) {
                    let meant = meant(&kind, KINDS.iter().copied());
                    return Err(format!("unsupported mount type {value:?}{meant}"));
                }
                all.kind = Some(kind);
            }
            "from" => all.from = Some(value),
            "source" | "src" => all.source = Some(value),
            "target" | "dst" | "destination" => all.target = Some(value),
            "readonly" | "ro" => all.readonly = Some(boolean(&value).ok_or_else(wrong)?),
            "readwrite" | "rw" => all.readonly = Some(!boolean(&value).ok_or_else(wrong)?),
            "required" => all.required = Some(boolean(&value).ok_or_else(wrong)?),
            "size" => all.size = Some(bytes(&value).ok_or_else(wrong)?),
            "id" => all.id = Some(value),
            "env" => all.variable = Some(value),
            "sharing" => {
                all.sharing = Some(match value.to_ascii_lowercase().as_str() {
                    "shared" => Sharing::Shared,
                    "private" => Sharing::Private,
                    "locked" => Sharing::Locked,
                    _ => return Err(format!("unsupported sharing value {value:?}")),
                });
            }
            "mode" => all.mode = Some(number(8)? & 0o7777),
            "uid" => all.uid = Some(number(10)?),
            "gid" => all.gid = Some(number(10)?),
            _ => {
                let meant = meant(&key, KEYS.iter().copied());
                return Err(format!("unexpected key '{key}' in '{field}'{meant}"));
            }
        }
    }
    all.mount()
}

/// The stage or image that a mount is of, without looking at the rest.
pub fn from(text: &str) -> Result<Option<String>, String> {
    let all = fields(text)?;
    let from = |field: &String| {
        let (key, value) = field.split_once('=')?;
        key.eq_ignore_ascii_case("from").then(|| value.to_owned())
    };
    Ok(all.iter().filter_map(from).next_back())
}

impl Fields {
    fn mount(self) -> Result<Mount, String> {
        let kind = self.kind.as_deref().unwrap_or("bind");
        let unexpected = [
            ("required", self.required.is_some(), &["secret", "ssh"][..]),
            ("size", self.size.is_some(), &["tmpfs"]),
            ("env", self.variable.is_some(), &["secret"]),
        ];
        if let Some((key, ..)) = unexpected.iter().find(|(_, given, of)| *given && !of.contains(&kind)) {
            return Err(format!("unexpected key '{key}' for mount type '{kind}'"));
        }
        let owned = [("mode", self.mode.is_some()), ("uid", self.uid.is_some()), ("gid", self.gid.is_some())];
        if let Some((key, _)) = owned.iter().find(|(_, given)| *given && matches!(kind, "bind" | "tmpfs")) {
            return Err(format!("{key} not allowed for {kind:?} type mounts"));
        }
        if self.sharing.is_some() && kind != "cache" {
            return Err(format!("invalid cache sharing set for {kind} mount"));
        }
        if self.from.is_some() && kind != "bind" {
            // Upstream can begin a cache with the files of a stage; everything else that could be meant is wrong there too.
            return Err(format!("{kind} mount should not have a from"));
        }
        let owner =
            Owner { mode: self.mode, uid: self.uid.unwrap_or_default(), gid: self.gid.unwrap_or_default() };
        let required = self.required.unwrap_or(false);
        let target = self.target.clone().unwrap_or_default();
        if target.is_empty() && !matches!(kind, "secret" | "ssh") {
            return Err("invalid mount: target is required".to_owned());
        }
        let made = match kind {
            "bind" => Kind::Bind { from: self.from, source: self.source.unwrap_or_default() },
            "cache" => {
                if self.source.is_some() {
                    return Err("unexpected key 'source' for mount type 'cache'".to_owned());
                }
                let id = self.id.filter(|id| !id.is_empty()).unwrap_or_else(|| target.clone());
                Kind::Cache { id, sharing: self.sharing.unwrap_or_default(), owner }
            }
            "tmpfs" => Kind::Tmpfs { size: self.size.unwrap_or(0) },
            "secret" => {
                if self.source.is_some() && self.id.is_some() {
                    return Err("both source and id can't be set".to_owned());
                }
                let named = Path::new(&target).file_name().map(|name| name.to_string_lossy().into_owned());
                let id = self.id.or(self.source).or(named).filter(|id| !id.is_empty());
                let id = id.ok_or("invalid secret mount. one of source, target required")?;
                Kind::Secret { id, required, variable: self.variable, owner }
            }
            _ => Kind::Ssh { id: self.id.unwrap_or_else(|| "default".to_owned()), required },
        };
        let writable = matches!(made, Kind::Cache { .. } | Kind::Tmpfs { .. });
        Ok(Mount { kind: made, target, readonly: self.readonly.unwrap_or(!writable) })
    }
}

/// Values that commas set apart; quotes hold one with commas in it together.
pub fn fields(text: &str) -> Result<Vec<String>, String> {
    let (mut all, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => field.extend(chars.next()),
            '"' if quoted || field.is_empty() => quoted = !quoted,
            ',' if !quoted => all.push(std::mem::take(&mut field)),
            c => field.push(c),
        }
    }
    if quoted {
        return Err("failed to parse csv mounts: extraneous or missing \" in quoted-field".to_owned());
    }
    all.push(field);
    Ok(all)
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// `64m`, `1.5GiB`, `1024`: units of 1024.
fn bytes(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    let number: f64 = number.parse().ok()?;
    let bytes = number * (1u64 << shift) as f64;
    (bytes < (1u64 << 60) as f64).then_some(bytes as u64)
}

/// Where a secret of the command line is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    File(PathBuf),
    Variable(String),
}

/// `id=x,src=FILE`, `id=x,env=NAME`, or `id=x` for the variable of that name.
pub fn secret(text: &str) -> Result<(String, Found), String> {
    let (mut id, mut kind, mut file, mut variable) = (None, None, None, None);
    for field in fields(text)? {
        let (key, value) = field
            .split_once('=')
            .ok_or_else(|| format!("invalid field '{field}' must be a key=value pair"))?;
        let value = value.to_owned();
        match key.to_ascii_lowercase().as_str() {
            "id" => id = Some(value),
            "type" if matches!(value.as_str(), "file" | "env") => kind = Some(value),
            "type" => return Err(format!("unsupported secret type {value:?}")),
            "src" | "source" => file = Some(value),
            "env" => variable = Some(value),
            key => return Err(format!("unexpected key '{key}' in '{field}'")),
        }
    }
    let id =
        id.filter(|id| !id.is_empty()).ok_or_else(|| format!("invalid secret {text:?}: it has no id"))?;
    let found = match (kind.as_deref(), file, variable) {
        (Some("env"), name, None) | (Some("env"), None, name) => {
            Found::Variable(name.unwrap_or_else(|| id.clone()))
        }
        (_, Some(file), None) => Found::File(file.into()),
        (None, None, Some(name)) => Found::Variable(name),
        (None, None, None) if std::env::var_os(&id).is_some() => Found::Variable(id.clone()),
        (_, None, None) => Found::File(id.clone().into()),
        _ => return Err(format!("invalid secret {text:?}: it is either a file or a variable")),
    };
    Ok((id, found))
}

/// `default`, or `id=SOCKET`.
pub fn ssh(text: &str) -> Result<(String, PathBuf), String> {
    let (id, socket) = text.split_once('=').map_or((text, None), |(id, socket)| (id, Some(socket.into())));
    let socket = socket.or_else(|| std::env::var_os("SSH_AUTH_SOCK").map(PathBuf::from));
    let socket = socket.ok_or("invalid empty ssh agent socket: make sure SSH_AUTH_SOCK is set")?;
    Ok((id.to_owned(), socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: Result<Mount, &str>) {
        let expand = |value: &str| Ok(value.replace("$V", "1"));
        assert_eq!(parse(text, expand), want.map_err(str::to_owned), "{text}");
    }

    fn mount(kind: Kind, target: &str, readonly: bool) -> Mount {
        Mount { kind, target: target.to_owned(), readonly }
    }

    fn bind(from: Option<&str>, source: &str) -> Kind {
        Kind::Bind { from: from.map(str::to_owned), source: source.to_owned() }
    }

    #[test]
    fn mounts_are_read() {
        check("target=/x", Ok(mount(bind(None, ""), "/x", true)));
        check("type=bind,from=a,src=b,dst=c$V,rw", Ok(mount(bind(Some("a"), "b"), "c1", false)));
        check("\"source=a,b\",target=/x,ro=false", Ok(mount(bind(None, "a,b"), "/x", false)));
        let cache = |id: &str, sharing, owner| Kind::Cache { id: id.to_owned(), sharing, owner };
        check("type=cache,target=/c", Ok(mount(cache("/c", Sharing::Shared, Owner::default()), "/c", false)));
        let owner = Owner { mode: Some(0o700), uid: 1, gid: 2 };
        check(
            "type=cache,id=i,target=/c,sharing=locked,mode=0700,uid=1,gid=2,ro",
            Ok(mount(cache("i", Sharing::Locked, owner), "/c", true)),
        );
        check("type=tmpfs,target=/t,size=1.5m", Ok(mount(Kind::Tmpfs { size: 3 << 19 }, "/t", false)));
        let secret = |id: &str, required, variable: Option<&str>| Kind::Secret {
            id: id.to_owned(),
            required,
            variable: variable.map(str::to_owned),
            owner: Owner::default(),
        };
        check("type=secret,id=s", Ok(mount(secret("s", false, None), "", true)));
        check("type=secret,target=/a/t,required", Ok(mount(secret("t", true, None), "/a/t", true)));
        check("type=secret,id=s,env=S,required=true", Ok(mount(secret("s", true, Some("S")), "", true)));
        check("type=ssh", Ok(mount(Kind::Ssh { id: "default".to_owned(), required: false }, "", true)));
    }

    #[test]
    fn what_is_wrong_with_a_mount_is_said() {
        check("type=bnd,target=/x", Err("unsupported mount type \"bnd\" (did you mean bind?)"));
        check("type=cache", Err("invalid mount: target is required"));
        check("type=cache,target=/x,from=a", Err("cache mount should not have a from"));
        check("type=cache,target=/x,sharing=x", Err("unsupported sharing value \"x\""));
        check("target=/x,sharing=locked", Err("invalid cache sharing set for bind mount"));
        check("target=/x,mode=1", Err("mode not allowed for \"bind\" type mounts"));
        check("type=tmpfs,target=/x,size=x", Err("invalid value for size: x"));
        check("target=/x,size=1", Err("unexpected key 'size' for mount type 'bind'"));
        check("target=/x,required", Err("unexpected key 'required' for mount type 'bind'"));
        check("target=/x,bogus=1", Err("unexpected key 'bogus' in 'bogus=1'"));
        check("tagret=/x", Err("unexpected key 'tagret' in 'tagret=/x' (did you mean target?)"));
        check("target", Err("invalid field 'target' must be a key=value pair"));
        check("type=secret", Err("invalid secret mount. one of source, target required"));
        check("type=secret,id=a,src=b", Err("both source and id can't be set"));
        check(
            "from=$A,target=/x",
            Err("'from' doesn't support variable expansion, define alias stage instead"),
        );
        check("\"target=/x", Err("failed to parse csv mounts: extraneous or missing \" in quoted-field"));
    }

    #[test]
    fn secrets_come_from_files_and_variables() {
        let file = |path: &str| Found::File(path.into());
        let variable = |name: &str| Found::Variable(name.to_owned());
        for (text, want) in [
            ("id=a,src=/f", Ok(file("/f"))),
            ("id=a,env=B", Ok(variable("B"))),
            ("type=env,id=A", Ok(variable("A"))),
            ("id=no-such-variable", Ok(file("no-such-variable"))),
            ("id=PATH", Ok(variable("PATH"))),
            ("src=/f", Err("invalid secret \"src=/f\": it has no id")),
            (
                "id=a,src=/f,env=B",
                Err("invalid secret \"id=a,src=/f,env=B\": it is either a file or a variable"),
            ),
            ("id=a,type=x", Err("unsupported secret type \"x\"")),
        ] {
            assert_eq!(secret(text).map(|(_, found)| found), want.map_err(str::to_owned), "{text}");
        }
        assert_eq!(ssh("a=/s").unwrap(), ("a".to_owned(), PathBuf::from("/s")));
    }
}
