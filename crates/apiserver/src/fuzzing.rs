//! What of this crate reads bytes of clients, as `crates/fuzzing` feeds it: each panics when something is wrong.

use std::sync::{Arc, LazyLock};

use jiff::Timestamp;
use jsonwebtoken::{Algorithm, EncodingKey};
use minke_api::{Kind, Object, Revision};
use rustls::pki_types::CertificateDer;

use crate::Snapshots;
use crate::http::negotiate;
use crate::http::rest::list_query;
use crate::http::{Query, Route};
use crate::registry::Token;
use crate::tokens::Tokens;

/// A request target: which resource it names, and what a list or watch is asked.
pub fn request_target(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    let route = Route::parse(path);
    let pod = Kind::by_kind("", "v1", "Pod").expect("the kind is built in");
    let kind = route.as_ref().and_then(Route::kind).unwrap_or(pod);
    let query = Query::parse(Some(query));
    for watch in [false, true] {
        let Ok(asked) = list_query(&query, kind, watch) else { continue };
        if let Some(Ok(token)) = asked.continue_.map(|text| Token::decode(&text)) {
            assert_eq!(Token::decode(&token.encode()).ok(), Some(token));
        }
    }
    negotiate::negotiate(query.get("accept").unwrap_or_default());
}

/// A client's certificate, without its signature being looked at.
pub fn certificate(data: &[u8]) {
    if let Some(user) = crate::authn::certificate_user(&CertificateDer::from(data)) {
        assert!(!user.name.is_empty());
        assert!(user.groups.iter().any(|group| group == "system:authenticated"));
    }
}

struct Nothing;

impl Snapshots for Nothing {
    fn get(&self, _: &'static Kind, _: &str, _: &str) -> Option<Arc<Object>> {
        None
    }

    fn list(&self, _: &'static Kind, _: &str) -> Vec<Arc<Object>> {
        Vec::new()
    }

    fn kind_revision(&self, _: &'static Kind) -> Revision {
        Revision(1)
    }
}

/// A bearer token as it is, and as claims that the right key has signed, of an account that is not there.
pub fn token(data: &[u8]) {
    static TOKENS: LazyLock<(Tokens, EncodingKey)> = LazyLock::new(|| {
        let pem = rcgen::KeyPair::generate().expect("a key can be made").serialize_pem();
        let key = EncodingKey::from_ec_pem(pem.as_bytes()).expect("it is a P-256 key");
        (Tokens::new(&pem, "https://issuer", vec!["https://issuer".to_owned()]).expect("it is good"), key)
    });
    let (tokens, key) = &*TOKENS;
    let Ok(text) = std::str::from_utf8(data) else { return };
    let refused = |token: &str| {
        let verified = tokens.verify(&Nothing, token, &[], Timestamp::UNIX_EPOCH);
        assert!(verified.is_err(), "a token of nobody is good: {token}");
    };
    refused(text);
    let encode = |text: &str| {
        use base64::Engine;
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text)
    };
    let message = format!("{}.{}", encode(r#"{"typ":"JWT","alg":"ES256"}"#), encode(text));
    if let Ok(signature) = jsonwebtoken::crypto::sign(message.as_bytes(), key, Algorithm::ES256) {
        refused(&format!("{message}.{signature}"));
    }
}
