use std::io::Cursor;
use std::io::Write;

use serde_json::json;

use super::unpack::tests::Layer;
use super::*;

fn is_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    eprintln!("skipped: unpacking sets owners, which needs root");
    false
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn digest(bytes: &[u8]) -> String {
    archive::digest_of(bytes)
}

fn config(diff_ids: &[String]) -> Vec<u8> {
    json!({
        "architecture": archive::own_architecture(), "os": "linux",
        "config": { "Cmd": ["/bin/sh"], "Env": ["A=1"], "User": "7:8", "WorkingDir": "/w" },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string()
    .into_bytes()
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

/// As `docker save` of old wrote it.
fn docker_archive(layers: &[Vec<u8>], tag: &str) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|l| digest(l)).collect();
    let config = config(&diff_ids);
    let names: Vec<String> = (0..layers.len()).map(|n| format!("l{n}/layer.tar")).collect();
    let manifest = json!([{ "Config": "c.json", "RepoTags": [tag], "Layers": names }]).to_string();
    let mut files: Vec<(&str, &[u8])> = vec![("c.json", &config), ("manifest.json", manifest.as_bytes())];
    files.extend(names.iter().map(String::as_str).zip(layers.iter().map(Vec::as_slice)));
    tar_of(&files)
}

fn store(root: &Path) -> ImageStore {
    ImageStore::open(root, RegistryConfig::default()).unwrap()
}

#[tokio::test]
async fn an_image_goes_in_and_out_and_away() {
    if !is_root() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let store_a = store(tmp.path());
    let layers = [Layer::new().file("a", "1").bytes(), Layer::new().file("b", "2").bytes()];
    let archive = gzip(&docker_archive(&layers, "hello:v1"));
    let names = store_a.load(Cursor::new(archive), None, None).await.unwrap();
    assert_eq!(names, ["docker.io/library/hello:v1"]);
    let image = store_a.resolve("hello:v1").await.unwrap().unwrap();
    assert_eq!(image.config.cmd, ["/bin/sh"]);
    assert_eq!((image.config.user.as_str(), image.config.uid()), ("7:8", Some(7)));
    let prepared = store_a.prepare(&image.id).unwrap();
    let top = tmp.path().join("snapshots").join(&prepared.layers[0]);
    assert_eq!(fs::read_to_string(top.join("b")).unwrap(), "2");

    // Another handle, as another process would have, sees it, and by the beginning of its id.
    let store_b = store(tmp.path());
    assert_eq!(store_b.resolve(&image.id[7..19]).await.unwrap().unwrap().id, image.id);
    store_b.tag("hello:v1", "other/name:x").await.unwrap();
    assert_eq!(store_a.resolve("other/name:x").await.unwrap().unwrap().tags.len(), 2);

    let saved = tmp.path().join("saved.tar");
    store_a.save(&["hello:v1".into()], fs::File::create(&saved).unwrap()).await.unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let other = store(elsewhere.path());
    let names = other.load(fs::File::open(&saved).unwrap(), None, None).await.unwrap();
    assert_eq!(names, ["docker.io/library/hello:v1"]);
    assert_eq!(other.resolve("hello:v1").await.unwrap().unwrap().id, image.id);

    store_a.remove("hello:v1").await.unwrap();
    assert!(top.exists(), "another tag still needs it");
    store_a.remove("other/name:x").await.unwrap();
    assert!(store_b.list().await.unwrap().is_empty());
    assert_nothing_left(tmp.path());
    assert!(store_a.remove("hello:v1").await.unwrap_err().is_not_found());
}

/// As tools in Go write them: with null for a list that is empty.
#[tokio::test]
async fn an_image_may_have_no_layers() {
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path());
    let mut config: serde_json::Value = serde_json::from_slice(&config(&[])).unwrap();
    config["rootfs"]["diff_ids"] = serde_json::Value::Null;
    let config = config.to_string();
    let manifest = json!([{ "Config": "c.json", "RepoTags": ["empty:1"], "Layers": null }]).to_string();
    let archive = tar_of(&[("c.json", config.as_bytes()), ("manifest.json", manifest.as_bytes())]);
    store.load(Cursor::new(archive), None, None).await.unwrap();
    let prepared = store.prepare("empty:1").unwrap();
    assert_eq!((prepared.layers.len(), prepared.config.cmd.len()), (0, 1));
    // It is built upon, and pruned, like any other.
    let draft = store.draft_of("empty:1").unwrap();
    store.finish(&draft, &["empty:2".to_owned()]).unwrap();
    assert!(store.prune(false).await.unwrap().is_empty(), "all have names");
    assert_eq!(store.prune(true).await.unwrap().len(), 2);
    assert_nothing_left(tmp.path());
}

#[track_caller]
fn assert_nothing_left(root: &Path) {
    for dir in ["images/blobs/sha256", "snapshots"] {
        let left: Vec<_> = fs::read_dir(root.join(dir)).unwrap().flatten().map(|e| e.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// An OCI layout with one image in an index of several platforms.
fn oci_archive(layer: &[u8], media_type: &str, plain: &[u8], name: &str) -> Vec<u8> {
    let config = config(&[digest(plain)]);
    let descriptor = |media_type: &str, bytes: &[u8]| json!({ "mediaType": media_type, "digest": digest(bytes), "size": bytes.len() });
    let manifest = json!({
        "schemaVersion": 2,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor(media_type, layer)],
    })
    .to_string()
    .into_bytes();
    let mut own = descriptor(archive::OCI_MANIFEST, &manifest);
    own["platform"] = json!({ "os": "linux", "architecture": archive::own_architecture() });
    let mut foreign = own.clone();
    foreign["platform"] = json!({ "os": "windows", "architecture": "amd64" });
    let inner = json!({ "schemaVersion": 2, "manifests": [foreign, own] }).to_string().into_bytes();
    let mut top = descriptor("application/vnd.oci.image.index.v1+json", &inner);
    top["annotations"] = json!({ "io.containerd.image.name": name });
    let index = json!({ "schemaVersion": 2, "manifests": [top] }).to_string();
    let path = |bytes: &[u8]| format!("blobs/sha256/{}", &digest(bytes)[7..]);
    tar_of(&[
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json", index.as_bytes()),
        (&path(&inner), &inner),
        (&path(&manifest), &manifest),
        (&path(&config), &config),
        (&path(layer), layer),
    ])
}

#[tokio::test]
async fn oci_archives_load_for_this_platform() {
    if !is_root() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path());
    let plain = Layer::new().file("z", "zstd").bytes();
    let layer = zstd::stream::encode_all(&plain[..], 3).unwrap();
    let archive = oci_archive(&layer, "application/vnd.oci.image.layer.v1.tar+zstd", &plain, "ghcr.io/a/b:1");
    assert_eq!(store.load(Cursor::new(archive), None, None).await.unwrap(), ["ghcr.io/a/b:1"]);
    let image = store.resolve("ghcr.io/a/b:1").await.unwrap().unwrap();
    assert_eq!(image.digests.len(), 1);
    assert!(store.resolve(&image.digests[0]).await.unwrap().is_some());
}

#[track_caller]
fn refuses(archive: Vec<u8>, want: &str) {
    if !is_root() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let store = store(tmp.path());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let error = runtime.block_on(store.load(Cursor::new(archive), None, None)).unwrap_err().to_string();
    assert!(error.contains(want), "{error}");
    store.collect_garbage();
    assert_nothing_left(tmp.path());
}

#[test]
fn archives_that_are_wrong_leave_nothing() {
    let good = Layer::new().file("a", "1").bytes();
    refuses(b"not a tar at all".to_vec(), "unrecognized image format: this is not a tar archive");
    refuses(vec![b'x'; 1024], "unrecognized image format: this is not a tar archive");
    refuses(tar_of(&[("hello", b"x")]), "unrecognized image format");
    refuses(tar_of(&[("manifest.json", b"{")]), "manifest.json: ");
    refuses(tar_of(&[("blobs/sha256/00", b"x")]), "unexpected commit digest");
    let manifest = json!([{ "Config": "c", "RepoTags": ["a:b"], "Layers": ["l"] }]).to_string();
    refuses(tar_of(&[("manifest.json", manifest.as_bytes())]), "c is not in the archive");
    let lying = config(&[digest(b"something else")]);
    let files: [(&str, &[u8]); 3] = [("manifest.json", manifest.as_bytes()), ("c", &lying), ("l", &good)];
    refuses(tar_of(&files), "wrong diff id");
    let none = config(&[]);
    let files: [(&str, &[u8]); 3] = [("manifest.json", manifest.as_bytes()), ("c", &none), ("l", &good)];
    refuses(tar_of(&files), "has 1 layers, and its configuration names 0");
    refuses(docker_archive(&[Layer::new().file("../x", "").bytes()], "a:b"), "leads out of the layer");
    refuses(docker_archive(std::slice::from_ref(&good), "UPPER"), "must be lowercase");
    // What would take memory or time without end is not read.
    let mut long = tar::Header::new_gnu();
    long.set_entry_type(tar::EntryType::GNULongName);
    long.set_size(8 << 20);
    long.set_cksum();
    let mut name = tar::Builder::new(Vec::new());
    name.append(&long, io::Read::take(io::repeat(b'a'), 8 << 20)).unwrap();
    refuses(gzip(&name.into_inner().unwrap()), "an extended header of 8388608 bytes");
    let names = |digest: &str| vec![json!({ "digest": digest, "size": 1 }); 2000];
    let path = |bytes: &[u8]| format!("blobs/sha256/{}", &digest(bytes)[7..]);
    let leaf = b"{}".to_vec();
    let middle = json!({ "manifests": names(&digest(&leaf)) }).to_string().into_bytes();
    let top = json!({ "manifests": names(&digest(&middle)) }).to_string();
    let (leaf_path, middle_path) = (path(&leaf), path(&middle));
    let files: [(&str, &[u8]); 4] =
        [("oci-layout", b"{}"), ("index.json", top.as_bytes()), (&middle_path, &middle), (&leaf_path, &leaf)];
    refuses(tar_of(&files), "too many indexes");
    let bad = format!("blobs/sha256/{}", "0".repeat(64));
    refuses(tar_of(&[(&bad, b"lies")]), "unexpected commit digest");
    let mut cut = docker_archive(&[Layer::new().file("big", &"x".repeat(5000)).bytes()], "a:b");
    cut.truncate(cut.len() - 4000);
    refuses(cut, "announced");
}
